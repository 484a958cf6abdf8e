"""How long runs may take: from runs that were measured, else from FLOPs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from scripts.studies.cells import Cell, flops_per_token
from scripts.studies.protocol import Protocol
from scripts.studies.store import FinishedRun
from train.preflight.matmul_rate import measured_matmul_rate

START_SECONDS = 15.0  # imports, corpus, audit, evaluations
_UNMEASURED_MFU = 0.2  # of a small model on a CPU


@dataclass(frozen=True)
class Cost:
    """What runs take: their number, trained tokens, seconds in turn."""

    runs: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.runs + other.runs, self.tokens + other.tokens, self.seconds + other.seconds
        )


class Estimate:
    """Seconds of a study's runs.

    Args:
        protocol: whose store may hold runs of the same kind.

    Attributes:
        basis: what the estimate rests on.
    """

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        measured = [run for run in protocol.store.runs.values() if run.records]
        self._per_flop, self.basis = _seconds_per_flop(protocol, measured)

    def cost(self, cell: Cell, runs: int) -> Cost:
        """Of several runs such as one."""
        run = self._protocol.config(cell)
        tokens = 0 if run.train.eval_only else cell.steps * run.train.global_batch_tokens
        return Cost(runs, runs * tokens, runs * self.seconds(cell))

    def left(self, at_most: bool = False) -> Cost:
        """What the study still takes: to its next look, or with all seeds of every open arm."""
        plan = self._protocol.plan(at_most)
        return sum((self.cost(cell, wanted - done) for _, cell, wanted, done in plan), Cost())

    def seconds(self, cell: Cell) -> float:
        """Wall-clock of one run."""
        run = self._protocol.config(cell)
        if run.train.eval_only:
            return START_SECONDS
        tokens = cell.steps * run.train.global_batch_tokens
        return START_SECONDS + tokens * flops_per_token(run) * self._per_flop


def _seconds_per_flop(protocol: Protocol, measured: list[FinishedRun]) -> tuple[float, str]:
    if measured:
        costs = [
            statistics.mean(record["step_seconds"] for record in found.records)
            / (found.run.train.global_batch_tokens * flops_per_token(found.run))
            for found in measured
        ]
        return statistics.median(costs), f"as {len(measured)} finished runs took"
    example = next(iter(protocol.plan()))[1]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
        protocol.config(example).train.precision.value
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = measured_matmul_rate(device, dtype).usual
    return 1 / (rate * _UNMEASURED_MFU), f"assuming {_UNMEASURED_MFU:.0%} of this machine's matmuls"
