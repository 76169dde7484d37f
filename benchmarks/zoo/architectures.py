"""Network architectures in plain torch: those that no installed package has, without any weights.

Names of parameters in `EfficientNetLite` are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES: Final = 1000
_BRANCH: Final = 0.3  # of a residual branch beside its shortcut


class _Residual(nn.Module):
    """Adds a shortcut to what `body` makes, and applies ReLU.

    The branch is weak beside the shortcut, as training from zero (P. Goyal et al., 2017) leaves it: with random weights
    as strong as the shortcut each block makes the rounding errors of the one before 15 % larger, and 16 of them drown
    the answer.
    """

    def __init__(self, body: nn.Module, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else _conv_norm(channels, out, 1, stride)
        for norm in [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)][-1:]:
            nn.init.constant_(norm.weight, _BRANCH)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def _conv_norm(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """ResNet (K. He et al., CVPR 2016): with basic blocks (18) or bottlenecks (50)."""

    def __init__(self, depths: Sequence[int], *, bottleneck: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 << stage
            for block in range(depth):
                stride = 2 if stage and not block else 1
                out = width * (4 if bottleneck else 1)
                layers.append(_Residual(self._body(channels, width, out, stride, bottleneck), channels, out, stride))
                channels = out
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, CLASSES)

    @staticmethod
    def _body(channels: int, width: int, out: int, stride: int, bottleneck: bool) -> nn.Sequential:
        if not bottleneck:
            return nn.Sequential(_conv_norm(channels, width, 3, stride), nn.ReLU(), _conv_norm(width, out, 3))
        reduce, middle = _conv_norm(channels, width, 1), _conv_norm(width, width, 3, stride)
        return nn.Sequential(reduce, nn.ReLU(), middle, nn.ReLU(), _conv_norm(width, out, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of [batch, 3, height, width]."""
        return cast("Tensor", self.head(self.features(image)))


class _Squeeze(nn.Module):
    """Squeeze-and-excitation with a hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, (channels // 4 + 4) // 8 * 8)
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = functional.relu(self.reduce(functional.adaptive_avg_pool2d(x, 1)))
        return functional.hardsigmoid(self.expand(scale)) * x


class _Inverted(nn.Module):
    """MobileNetV3's inverted residual."""

    def __init__(self, channels: int, hidden: int, out: int, kernel: int, stride: int, *, se: bool, hard: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hidden != channels:
            layers += [_conv_norm(channels, hidden, 1), nn.Hardswish() if hard else nn.ReLU()]
        layers += [_conv_norm(hidden, hidden, kernel, stride, hidden), nn.Hardswish() if hard else nn.ReLU()]
        layers += [_Squeeze(hidden)] if se else []
        layers += [_conv_norm(hidden, out, 1)]
        self.body = nn.Sequential(*layers)
        self.keeps = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = cast("Tensor", self.body(x))
        return x + y if self.keeps else y


class MobileNetV3Small(nn.Module):
    """MobileNetV3-small (A. Howard et al., ICCV 2019)."""

    # kernel, hidden, out, squeeze-and-excitation, hard swish, stride
    BLOCKS: Final = (
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 144, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
        (5, 576, 96, True, True, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 16, 3, 2), nn.Hardswish()]
        channels = 16
        for kernel, hidden, out, se, hard, stride in self.BLOCKS:
            layers.append(_Inverted(channels, hidden, out, kernel, stride, se=se, hard=hard))
            channels = out
        layers += [_conv_norm(channels, 576, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Linear(576, 1024), nn.Hardswish()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(1024, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of [batch, 3, height, width]."""
        return cast("Tensor", self.head(self.features(image)))


class _Same(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, for a fixed size of input."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1, *, size: int) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, x: Tensor) -> Tensor:
        if self.before == self.after:
            return functional.conv2d(x, self.weight, None, self.stride, self.before, groups=self.groups)
        padded = functional.pad(x, (self.before, self.after, self.before, self.after))
        return functional.conv2d(padded, self.weight, None, self.stride, groups=self.groups)


class _LiteBlock(nn.Module):
    def __init__(self, channels: int, expand: int, out: int, kernel: int, stride: int, size: int) -> None:
        super().__init__()
        hidden = channels * expand
        if expand != 1:
            self._expand_conv = _Same(channels, hidden, 1, size=size)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = _Same(hidden, hidden, kernel, stride, hidden, size=size)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = _Same(hidden, out, 1, size=math.ceil(size / stride))
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)
        self.expands, self.keeps = expand != 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = cast("Tensor", self._bn2(self._project_conv(y)))
        return x + y if self.keeps else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite (after M. Tan and Q. Le, ICML 2019): no squeeze-and-excitation, stem and head unscaled."""

    SIZES: Final = ((1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260))  # width, depth, pixels of Lite0, 1, 2
    # repeats, kernel, stride, expansion, channels
    STAGES: Final = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self, which: int) -> None:
        super().__init__()
        width, depth, size = self.SIZES[which]
        self._conv_stem = _Same(3, 32, 3, 2, size=size)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        size = math.ceil(size / 2)
        blocks: list[nn.Module] = []
        channels = 32
        for stage, (repeats, kernel, stride, expand, base) in enumerate(self.STAGES):
            out = _round_channels(base * width)
            edge = stage in {0, len(self.STAGES) - 1}
            for repeat in range(repeats if edge else math.ceil(repeats * depth)):
                step = stride if not repeat else 1
                blocks.append(_LiteBlock(channels, expand, out, kernel, step, size))
                channels, size = out, math.ceil(size / step)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = _Same(channels, 1280, 1, size=size)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc: nn.Module = nn.Linear(1280, CLASSES)

    def classify_with(self, head: nn.Module) -> None:
        """Replace the last layer, which takes 1,280 features."""
        self._fc = head

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of [batch, 3, height, width], pixels as (x - 127) / 128."""
        x = functional.relu6(self._bn0(self._conv_stem(image)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return cast("Tensor", self._fc(functional.adaptive_avg_pool2d(x, 1).flatten(1)))


def _round_channels(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class _EncoderBlock(nn.Module):
    """A transformer block, normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + cast("Tensor", self.contract(functional.gelu(self.expand(self.norm_2(x)))))


class VitTiny(nn.Module):
    """ViT-Ti/16 at 224 pixels (A. Dosovitskiy et al., ICLR 2021; H. Touvron et al., ICML 2021)."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.Sequential(*(_EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of [batch, 3, 224, 224]."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return cast("Tensor", self.head(self.norm(self.blocks(x))[:, 0]))


class _Norm2d(nn.LayerNorm):
    """Layer normalization over the channels of [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.contract(functional.gelu(self.expand(y))) * self.scale
        return cast("Tensor", x + y.permute(0, 3, 1, 2))


class ConvNextAtto(nn.Module):
    """ConvNeXt-atto (Z. Liu et al., CVPR 2022; the size after R. Wightman's timm)."""

    def __init__(self) -> None:
        super().__init__()
        widths, depths = (40, 80, 160, 320), (2, 2, 6, 2)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _Norm2d(widths[0], eps=1e-6)]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers += [_Norm2d(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [_ConvNextBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1]))
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of [batch, 3, height, width]."""
        return cast("Tensor", self.head(self.features(image)))


class GruTagger(nn.Module):
    """Two bidirectional GRU layers over a series, a class for the whole of it."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, series: Tensor) -> Tensor:
        """Return logits of [batch, points]."""
        return cast("Tensor", self.head(self.gru(series.unsqueeze(2))[0].mean(dim=1)))


class TemporalConvNet(nn.Module):
    """A temporal convolutional network (S. Bai et al., 2018): dilated causal convolutions with shortcuts."""

    def __init__(self, classes: int, width: int = 48, depth: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 5, dilation=1 << level) for level in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, series: Tensor) -> Tensor:
        """Return logits of [batch, points]."""
        x = self.stem(series.unsqueeze(1))
        for level, layer in enumerate(self.layers):
            x = x + functional.relu(layer(functional.pad(x, (4 << level, 0))))
        return cast("Tensor", self.head(x.mean(dim=2)))
