"""What an output says: the class, or the sequence of tokens, of each row. Compiler and device must read it alike.

Decodings, of outputs with the choices last:

    (none)   one logit per class, [rows, classes]: the largest one's place
    ctc      logits [rows, positions, tokens]: the likeliest token of each position, of equal neighbours one, without
             the blank, which is token 0 (greedy decoding; Graves et al., ICML 2006)
    tokens   the same without merging: one token for each position, 0 is padding

Sequences are rows of tokens, packed to the left, 0 after their end.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Decoding = Literal["", "ctc", "tokens"]
Answers = NDArray[np.int64]  # classes [rows], or tokens [rows, positions]
Flags = NDArray[np.bool_]


def decode(logits: NDArray[Any], decoding: Decoding = "") -> Answers:
    """Return what each row says."""
    best: Answers = np.asarray(logits).argmax(axis=-1)
    if not decoding:
        return best
    kept = best != 0
    if decoding == "ctc":
        kept[:, 1:] &= best[:, 1:] != best[:, :-1]
    order = np.argsort(~kept, axis=1, kind="stable")  # what is kept first, in its order
    return np.take_along_axis(np.where(kept, best, 0), order, axis=1)


def same_answers(first: Answers, second: Answers) -> Flags:
    """Return which rows say the same; sequences of different room are compared by their tokens."""
    if first.ndim == 1:
        return np.asarray(first == second)
    shared = min(first.shape[1], second.shape[1])
    same = (first[:, :shared] == second[:, :shared]).all(axis=1)
    return np.asarray(same & (first[:, shared:] == 0).all(axis=1) & (second[:, shared:] == 0).all(axis=1))
