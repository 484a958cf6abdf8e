"""Sections of a study's config: its arms, their search, and what else is asked of their runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ArmConfig:
    """One side of a comparison.

    Attributes:
        overrides: of ``train/pretrain.py``, on top of the study's ``base``.
        lr: learning rates that the search tries first, ascending; empty: those of the baseline.
        evaluates: another arm, whose trained weights this arm evaluates and does not train.
        fraction: of the study's steps that this arm trains for, with its own decay.
        steps: of its runs instead; 0: ``fraction`` of the study's.
        tune: other keys -> values that the search tries after the learning rate, key by key: what
            is best so far stays unless a value lowers the loss.
        like: another arm, whose overrides (grid, tune) it takes, its own behind them.
        seconds_of: another arm whose time it takes: as many steps as the arm ``like`` makes in the
            time that ``seconds_of`` runs, by the step times of both searches.
        flops_of: the same of training FLOPs, which follow from the configs.
    """

    overrides: list[str] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    evaluates: str = ""
    fraction: float = 1.0
    steps: int = 0
    tune: dict[str, list[str]] = field(default_factory=dict)
    like: str = ""
    seconds_of: str = ""
    flops_of: str = ""

    @property
    def paced_by(self) -> str:
        """The arm whose time or FLOPs it takes."""
        return self.seconds_of or self.flops_of


@dataclass
class SearchConfig:
    """The choice of each arm's learning rate.

    Attributes:
        seed: of all its runs; must not be among the study's.
        fraction: of the study's steps that a run of the search takes, with its own decay.
        factor: between a new learning rate and the edge of the grid that was best.
        extensions: how often a grid may grow before the study gives up.
    """

    seed: int = 0
    fraction: float = 1.0
    factor: float = 2.0
    extensions: int = 3


@dataclass
class CatchUpConfig:
    """How many steps one arm needs for another arm's final loss.

    Attributes:
        arm: that is also trained for fewer steps; empty: the question is not asked.
        to: the arm whose final loss is to be reached.
        fractions: of the study's steps, ascending, below 1; each run has its own whole decay.
    """

    arm: str = ""
    to: str = ""
    fractions: list[float] = field(default_factory=list)


@dataclass
class LawConfig:
    """A law of the final loss over training FLOPs (``scripts/studies/law.py``).

    Attributes:
        arms: the points, by FLOPs; empty: the question is not asked. The last one is also
            predicted from the others.
    """

    arms: list[str] = field(default_factory=list)


@dataclass
class LadderConfig:
    """How many steps one kind of arm needs for another's loss, at several lengths.

    Attributes:
        arms: of one kind by ascending steps, each tuned at its own; empty: not asked.
        to: of the other kind; the loss of each is to be reached. The last is also predicted.
    """

    arms: list[str] = field(default_factory=list)
    to: list[str] = field(default_factory=list)


@dataclass
class TransferConfig:
    """Whether the best learning rate stays while a model grows (``scripts/reports/transfer.py``).

    Every rate of an arm's grid trains on every seed; a grid grows until two rates lie on each side
    of the best.

    Attributes:
        along: what grows -> arms by size, the first held against the last; empty: not asked.
        factor: within which their best rates must lie.
    """

    along: dict[str, list[str]] = field(default_factory=dict)
    factor: float = 1.5


@dataclass
class ProbeConfig:
    """What every seed's run is asked once it is trained (``v4 probe``), beside its loss.

    Attributes:
        needle: kind of the questions; empty: nothing is asked.
        lengths: tokens of a document.
        depths: places of what is asked for, from a document's beginning to its end.
        count: documents of each length and depth.
        note: what a reader of the answers must know of the arms; stands in the report.
    """

    needle: str = ""
    lengths: list[int] = field(default_factory=list)
    depths: int = 5
    count: int = 16
    note: str = ""


@dataclass
class SequentialConfig:
    """Verdicts before all seeds are spent (``scripts/studies/sequential.py``).

    Attributes:
        looks: seeds after which open arms are judged, ascending; the last is all seeds. Empty: one
            verdict, over all seeds.
        spending: exponent; by n of N seeds ``level * (n / N) ** spending`` may be spent.
        futility: an arm whose chance of a verdict from the seeds left is smaller is stopped.
        power: for which the smallest effect is stated.
    """

    looks: list[int] = field(default_factory=list)
    spending: float = 1.0
    futility: float = 0.1
    power: float = 0.8
