"""The source of a factory's file, as somebody writes it beside the weights."""

SOURCE = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(20, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.words(tokens).mean(1))


def make():
    return Net(), {"tokens": torch.zeros((1, 6), dtype=torch.int64)}


def with_sequence():
    return Net(), {"tokens": torch.zeros((2, 6), dtype=torch.int64)}, {"tokens": {0: "batch", 1: "sequence"}}


def attribute():
    net = Net()
    net.example_inputs = {"tokens": torch.zeros((2, 6), dtype=torch.int64)}
    return net


def nothing():
    return None


def fails():
    raise RuntimeError("no such layer")


class Fixed(Net):
    def forward(self, tokens):
        return super().forward(tokens.reshape(3, 6))


def fixed():
    return Fixed(), {"tokens": torch.zeros((3, 6), dtype=torch.int64)}
"""
