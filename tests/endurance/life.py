"""A life of a run: what happens to its folder, start by start; drawn from a seed alone.

A life is data, not a program: its starts and events are drawn before anything runs, and say "the
newest checkpoint" or "the 41st write" instead of what a run happened to do. So a seed repeats a
life, and a life can be made simpler, one event at a time, while it still fails (:func:`simpler`).
That is why it is not a state machine of hypothesis, whose choices follow from the state that it
met and whose seeds do not last from one version of it to the next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

MOST_STEPS = 8  # of any life

# Name -> number of ranks, and the words that ask for it.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "alone": (1, ("train.micro_batch_size=2",)),
    "replicas": (
        2,
        ("train.micro_batch_size=1", "parallel.dp_replicate=2", "parallel.dp_shard=1"),
    ),
    "shards": (2, ("train.micro_batch_size=1", "parallel.dp_shard=2")),
    "experts": (2, ("train.micro_batch_size=1", "parallel.dp_shard=2", "parallel.ep=2")),
    "stages": (2, ("train.micro_batch_size=1", "parallel.pp=2", "parallel.dp_shard=1")),
}
# What a life cannot change.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "average": ("train.ema_decay=0.9",),
    # These choose experts for later steps, up to the last, so they are never extended.
    "anticipating": (
        "train.recovery.anticipatory=always",
        "train.recovery.anticipatory_lag=2",
    ),
    "both": (
        "train.ema_decay=0.9",
        "train.recovery.anticipatory=always",
        "train.recovery.anticipatory_lag=1",
    ),
}

UNBUILT = {"stages": ("anticipating", "both")}  # layout -> variants that it refuses

# Events between two starts.
DAMAGE, CONFIG_DAMAGE, METRICS_DAMAGE = "damage", "config damaged", "metrics damaged"
CLOCK, MOVE = "clock set back", "folder moved"
BETWEEN = (DAMAGE, CONFIG_DAMAGE, METRICS_DAMAGE, CLOCK, MOVE)
# What a start asks for that another did not: these are events too, without a field of their own.
EXTEND, RETENTION, LAYOUT = "extended", "retention changed", "other layout"
# Events of a start.
END, OTHER_RUN, LOCKED = "to the end", "other run", "read-only folder"
KILL, POWER, TERM = "killed", "power lost", "terminated"
NAN, FULL, READ_ONLY, PINNED = "weights spoilt", "disk full", "turned read-only", "pruning fails"
SECOND, EXPORT = "second start", "export"
DURING = (
    END, OTHER_RUN, LOCKED, KILL, POWER, TERM, NAN, FULL, READ_ONLY, PINNED, SECOND, EXPORT,
)  # fmt: skip
_WEIGHTS = (2, 1, 1, 4, 2, 3, 2, 3, 2, 3, 3, 3)
EVENTS = (*BETWEEN, EXTEND, RETENTION, LAYOUT, *DURING)

MAIN, SAVE = "main", "save"  # threads whose calls are counted
WRITE, OTHER = "write", "other"  # kinds of calls
_CALLS = {  # of a start of some steps
    (MAIN, WRITE): 12, (MAIN, OTHER): 36, (SAVE, WRITE): 1000, (SAVE, OTHER): 60,
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One thing that happens.

    Attributes:
        name: one of :data:`BETWEEN` or :data:`DURING`.
        thread: of a start: whose calls to the file system are counted.
        call: the number of the call at which it happens; of NAN: the step; of damage: the place.
        rank: to which rank it happens.
        which: of several checkpoints, weights or durations.
        how: which kind of damage, or kind of call.
    """

    name: str = END
    thread: str = MAIN
    call: int = 1
    rank: int = 0
    which: int = 0
    how: str = ""


@dataclass(frozen=True)
class Start:
    """One start of the command.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        steps: ``train.steps``.
        every: ``train.checkpoint_every``.
        last: ``train.keep_checkpoints``.
        multiples: ``train.keep_checkpoints_every``.
        best: ``train.keep_best_checkpoints``.
        background: ``train.async_checkpoint``.
        before: what happens to the folder before it.
        during: what happens while it runs.
    """

    layout: str = "alone"
    steps: int = 6
    every: int = 2
    last: int = 2
    multiples: int = 0
    best: int = 0
    background: bool = True
    before: tuple[Event, ...] = ()
    during: Event = Event()

    @property
    def retention(self) -> tuple[int, int, int]:
        """Which checkpoints stay."""
        return self.last, self.multiples, self.best

    def words(self) -> list[str]:
        """The command line, without what every start of the life has."""
        evaluations = self.every if self.best else 0
        return [
            f"train.steps={self.steps}", f"train.checkpoint_every={self.every}",
            f"train.keep_checkpoints={self.last}", f"train.keep_checkpoints_every={self.multiples}",
            f"train.keep_best_checkpoints={self.best}", f"train.eval_every={evaluations}",
            f"train.async_checkpoint={str(self.background).lower()}", *LAYOUTS[self.layout][1],
        ]  # fmt: skip


@dataclass(frozen=True)
class Life:
    """All starts of a run folder; an undisturbed one follows them.

    Attributes:
        seed: from which it was drawn; -1: it was made simpler since.
        variant: one of :data:`VARIANTS`.
        starts: in order.
    """

    seed: int
    variant: str
    starts: tuple[Start, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Life:
        """The life of which these are the :meth:`as_json`."""
        starts = (
            Start(
                **{
                    **start,
                    "before": tuple(Event(**event) for event in start["before"]),
                    "during": Event(**start["during"]),
                }
            )
            for start in values["starts"]
        )
        return cls(values["seed"], values["variant"], tuple(starts))

    def final(self) -> Start:
        """The start after all that happens: it must bring the run to its end."""
        last = self.starts[-1]
        return replace(plain(last), steps=min(MOST_STEPS, last.steps + 1))


def plain(start: Start) -> Start:
    """The same start, undisturbed."""
    return replace(start, before=(), during=Event())


def draw(seed: int, ranks: int) -> Life:
    """The life of a seed: four starts or more, the last undisturbed one included.

    Args:
        seed: any number.
        ranks: 1 or 2: on how many most starts run.
    """
    rng = random.Random(f"{ranks} {seed}")
    usual = rng.choice(_layouts(ranks))
    start = replace(_retention(rng, Start()), layout=usual, steps=rng.randint(4, 7))
    variant = rng.choice([name for name in VARIANTS if name not in UNBUILT.get(usual, ())])
    starts = []
    for number in range(rng.randint(4, 6)):
        start = _next(rng, start, usual, variant, first=number == 0)
        starts.append(start)
    return Life(seed, variant, tuple(fitting(variant, start) for start in starts))


def fitting(variant: str, start: Start) -> Start:
    """The start as runs of a variant can be started."""
    anticipates = "train.recovery.anticipatory=always" in VARIANTS[variant]
    return replace(start, steps=MOST_STEPS) if anticipates else start


def _layouts(ranks: int) -> list[str]:
    return [name for name, (count, _) in LAYOUTS.items() if count == ranks]


def _next(rng: random.Random, start: Start, usual: str, variant: str, first: bool) -> Start:
    start = replace(start, before=(), during=_during(rng, LAYOUTS[usual][0]), layout=usual)
    if first:
        return start
    if rng.random() < 0.3:
        start = _retention(rng, start)
    if rng.random() < 0.2:
        start = replace(start, steps=min(MOST_STEPS, start.steps + rng.randint(1, 2)))
    if rng.random() < 0.07:
        others = [one for one in LAYOUTS if one != usual and variant not in UNBUILT.get(one, ())]
        start = replace(start, layout=rng.choice(others))
    if rng.random() < 0.5:
        start = replace(start, before=(_between(rng),))
    return start


def _retention(rng: random.Random, start: Start) -> Start:
    return replace(
        start,
        every=rng.randint(1, 3),
        last=rng.choice((1, 1, 2, 3)),
        multiples=rng.choice((0, 0, 3)),
        best=rng.choice((0, 0, 1)),
        background=rng.random() < 0.7,
    )


def _between(rng: random.Random) -> Event:
    name = rng.choices(BETWEEN, (5, 1, 1, 1, 1))[0]
    newest_more_often = rng.choice((0, 0, 0, 1, 2, ALL))
    how = rng.choice(("flip", "truncate", "delete"))
    return Event(name, call=rng.randrange(1 << 20), which=newest_more_often, how=how)


ALL = -1  # of the checkpoints


def _during(rng: random.Random, ranks: int) -> Event:
    name = rng.choices(DURING, _WEIGHTS)[0]
    thread, how = rng.choice(((MAIN, WRITE), (MAIN, OTHER), *[(SAVE, WRITE), (SAVE, OTHER)] * 2))
    call = 1 + int(_CALLS[thread, how] * rng.random() ** 2)  # many a start makes few
    if name == NAN:
        call = rng.randint(1, 6)
    return Event(name, thread, call, rng.randrange(ranks), rng.randrange(1 << 20), how)


def simpler(life: Life) -> Iterator[Life]:
    """Lives with one thing fewer, the most promising first."""
    starts = life.starts
    for i in range(len(starts)):
        if len(starts) > 1:
            yield Life(-1, life.variant, starts[:i] + starts[i + 1 :])
    plain = Start()
    for i, start in enumerate(starts):
        for change in (
            {"before": ()},
            {"during": Event()},
            {"layout": plain.layout},
            {"multiples": 0, "best": 0},
            {"background": False},
            {"last": plain.last, "every": plain.every},
        ):
            other = replace(start, **change)
            if other != start:
                yield Life(-1, life.variant, (*starts[:i], other, *starts[i + 1 :]))
    if life.variant != "plain":
        yield Life(-1, "plain", starts)
