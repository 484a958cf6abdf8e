"""What every probe asks: a document that ends in an answer."""

# Legend: N tokens of a document
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PROBE = 0x70726F6265  # keys of probes are no keys of training data


@dataclass(frozen=True)
class Question:
    """A document that ends in an answer, which is scored.

    Attributes:
        ids_N: tokens; int64.
        begin: first token of the answer.
        distance: tokens from the one that predicts the answer's first token back to what it is to
            be read from.
        chance: of guessing the whole answer, by someone who knows the form.
    """

    ids_N: np.ndarray
    begin: int
    distance: int
    chance: float
