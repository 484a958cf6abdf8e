"""How fast this machine multiplies matrices: the denominator of MFU.

MFU here is useful FLOPs (``model/flops.py``, recomputation not counted) per second over the rate
of a plain square matmul on the same device, threads and dtype, added up over ranks. A published
peak would be unknown for most CPUs and out of reach on the rest. Other work on the machine makes a
product slower, never faster: the best one counts, and where it is far from the usual one a line
says so. Ranks on one machine's cores are other work to each other, and the best of each would be
the rate of all cores, counted once a rank: they measure at the same time, and the usual one counts.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from parallel.launch import launched_here
from train.preflight.forecast import quantity

_BURSTS, _PAUSE = 6, 0.02  # of a measurement, and seconds between them
_LOADED = 2.0  # times that the best product is faster than the usual one, where work is beside it


class MatmulRate(NamedTuple):
    """FLOPs per second of square products.

    Attributes:
        peak: what the device reaches: of the best one; the usual one where ranks share cores.
        usual: median, beside whatever else is on the machine: what a run can expect.
        slowed: times that the best product is faster than the usual one of its size.
    """

    peak: float
    usual: float
    slowed: float = 1.0

    def under_load(self) -> str:
        """A line where other work took much of the machine; else empty."""
        if self.slowed <= _LOADED:
            return ""
        return (
            f"other work is on this machine: the best matmul made {quantity(self.peak)}FLOP/s, of"
            f" which mfu is told, and was {self.slowed:.1f} times as fast as the usual one"
        )


@functools.cache
def measured_matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int = 0, seconds: float = 0.3
) -> MatmulRate:
    """Of many square products in short bursts; without pauses where ranks share cores. Kept.

    Args:
        device: where the run computes.
        dtype: of the run's matmuls.
        size: rows and columns, and half of them: what is short is seldom interrupted; 0 takes 1024
            on a CPU and 8192 on a GPU.
        seconds: how long to measure; at least one product of each, after a small one that warms up.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    x = torch.ones(size, size, device=device, dtype=dtype)
    half = x[: size // 2, : size // 2].contiguous()
    _timed(x[:64, :64], x[:64, :64])
    shared = device.type == "cpu" and launched_here() > 1
    rates: list[tuple[float, float]] = []
    spent = resting = 0.0
    while not rates or spent < seconds:
        if spent > resting and not shared:
            time.sleep(_PAUSE)  # who has slept is given the cores at once, and holds them for a bit
            resting += seconds / _BURSTS
        times = [_timed(x, x), _timed(half, half)]
        rates.append((2 * size**3 / times[0], 2 * (size // 2) ** 3 / times[1]))
        spent += sum(times)
    of_sizes = [
        MatmulRate(max(found), statistics.median(found)) for found in zip(*rates, strict=True)
    ]
    usual = of_sizes[0].usual  # of what is too long to fall between other work
    if shared:
        return MatmulRate(usual, usual)
    best, beside, _ = max(of_sizes)  # of one size, since sizes differ also on an idle machine
    return MatmulRate(best, usual, best / beside)


def times_slower_than_fp32(device: torch.device, dtype: torch.dtype) -> float:
    """How much longer a product takes in ``dtype`` here; a CPU without bf16 units emulates them."""
    fp32, other = (measured_matmul_rate(device, kind).peak for kind in (torch.float32, dtype))
    return fp32 / other


def matmul_rates(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int, int]],
    seconds: float = 0.2,
    least: int = 5,
) -> dict[torch.dtype, float]:
    """FLOPs per second of some products in several dtypes, to compare these, also under load.

    On one thread, since threads that wait for each other on busy cores measure nothing else; the
    dtypes take turns, and of each product the best time counts: other load only ever adds to it.

    Args:
        device: where to measure.
        dtypes: to be compared.
        shapes: (rows, inner, columns) of each product.
        seconds: how long to measure all together.
        least: rounds at least, the first of which warms up.
    """
    operands = {
        (dtype, shape): (
            torch.ones(shape[0], shape[1], device=device, dtype=dtype),
            torch.ones(shape[2], shape[1], device=device, dtype=dtype).T,
        )
        for shape in shapes
        for dtype in dtypes
    }
    best = dict.fromkeys(operands, float("inf"))
    threads, rounds, begin = torch.get_num_threads(), 0, time.perf_counter()
    torch.set_num_threads(1)
    try:
        while rounds < least or time.perf_counter() - begin < seconds:
            for product, (x, y) in operands.items():
                best[product] = min(best[product], _timed(x, y))
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    flops = sum(2 * n * k * m for n, k, m in shapes)
    return {d: flops / sum(best[d, shape] for shape in shapes) for d in dtypes}


def _timed(x: torch.Tensor, y: torch.Tensor) -> float:
    _synchronize(x.device)
    begin = time.perf_counter()
    torch.mm(x, y)
    _synchronize(x.device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
