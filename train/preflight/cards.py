"""Cards by name: memory, bandwidth, and peak rates of dense matmuls, as their maker says.

Figures of NVIDIA's public data sheets; where a sheet gives the rate with 2:4 sparsity alone, half
of it. They serve forecasts for machines that are not here; nothing of them was measured.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from train.errors import UserError


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        name: as in the table.
        memory_gb: in 1e9 bytes, as sold.
        bf16_tflops: dense, 1e12 FLOPs per second, sums in fp32.
        fp32_tflops: without TF32.
        bandwidth_gb: of its memory, 1e9 bytes per second.
    """

    name: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float = 0.0
    bandwidth_gb: float = 0.0


CARDS = tuple(Card(*row) for row in (
    ("rtx3090", 24, 71.0, 35.6, 936),
    ("rtx4090", 24, 165.2, 82.6, 1008),
    ("rtx5090", 32, 209.5, 104.8, 1792),
    ("a10", 24, 125.0, 31.2, 600),
    ("l4", 24, 121.0, 30.3, 300),
    ("l40s", 48, 362.0, 91.6, 864),
    ("a100-40", 40, 312.0, 19.5, 1555),
    ("a100-80", 80, 312.0, 19.5, 2039),
    ("h100-pcie", 80, 756.0, 51.0, 2000),
    ("h100", 80, 989.0, 67.0, 3350),
    ("h20", 96, 148.0, 44.0, 4000),
    ("h200", 141, 989.0, 67.0, 4800),
    ("b200", 180, 2250.0, 80.0, 8000),
))  # fmt: skip


def card(name: str) -> Card:
    """A card by its name, however it is spelled.

    Raises:
        UserError: the table has none of that name.
    """
    known = {_plain(one.name): one for one in CARDS}
    if (found := known.get(_plain(name))) is not None:
        return found
    near = difflib.get_close_matches(_plain(name), known, n=1)
    names = ", ".join(one.name for one in CARDS)
    hint = f"did you mean {known[near[0]].name}?" if near else f"there are {names}"
    raise UserError(f"--card {name}: {hint} (any other by --memory GB --tflops N)")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()).removeprefix("nvidia")
