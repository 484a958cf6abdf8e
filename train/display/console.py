"""The console: on a terminal lines that stay and a bar below them, in a log lines alone.

A line holds as many whole fields as fit, the most telling ones first: a number is never cut. What
does not fit stands in ``metrics.jsonl`` and ``report.html``. Under torchrun rank 0 alone has one.
In a notebook's cell and behind a pipe stderr is no terminal, so there are lines.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from train.terminal import NARROWEST, columns

log = logging.getLogger(__name__)

_SHOWN = (
    "loss", "loss_mtp", "loss_indexer", "val_loss", "val_bits_per_byte", "val_loss_average", "lr",
    "grad_norm", "skipped_steps", "rollbacks", "tokens_per_second", "mfu",
)  # fmt: skip
_TELLING = (
    "loss", "val_loss", "skipped_steps", "rollbacks", "val_bits_per_byte", "lr", "grad_norm",
    "tokens_per_second", "loss_mtp", "val_loss_average", "loss_indexer", "mfu",
)  # fmt: skip
_HIDDEN_AT_ZERO = {"skipped_steps", "rollbacks", "loss_mtp", "loss_indexer"}
_BAR = 10  # columns that the bar itself needs
_TIMES = ("step_seconds", "eval_seconds", "checkpoint_seconds")  # a step, and what is around it
_NEWEST = 50  # steps by whose times the time left is told
SLOW = 10.0  # seconds after which a step tells of its microbatches


class Console:
    """A tracker for people who watch.

    Args:
        steps: of the whole run.
        done: steps that an earlier start of the run took.
        every: steps between lines.
        bar: draw a bar; default: when stderr is a terminal.
        live: whether records come as they are made; else the time left is told by their own times,
            those of the newest steps, with what stands between them.
    """

    def __init__(
        self, steps: int, done: int, every: int, bar: bool | None = None, live: bool = True
    ) -> None:
        self.steps, self.every, self._live = steps, every, live
        self._started, self._done_before = time.monotonic(), done
        self._seen: dict[str, Any] = {}  # the newest value of each field
        self._told_microbatches = 0.0  # when, as time.monotonic
        self._spent: deque[float] = deque(maxlen=_NEWEST)  # seconds of each step
        self._bar, self._screen = None, ExitStack()
        if sys.stderr.isatty() if bar is None else bar:
            self._bar = tqdm(
                total=steps, initial=done, ncols=_columns() - 1, leave=True,
                bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}",
            )  # fmt: skip
            self._screen.enter_context(logging_redirect_tqdm())

    def remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the times of steps that are not shown."""
        self._spent += [sum(record.get(name) or 0.0 for name in _TIMES) for record in records]

    def show(self, record: Mapping[str, Any]) -> None:
        """Advance the bar; write a line every few steps and at each evaluation."""
        step = record["step"]
        self.remember([record])
        self._seen |= {name: record[name] for name in _SHOWN if name in record}
        left = f"left {self._left(record)}"
        if step % self.every == 0 or step in (1, self.steps) or "val_loss" in record:
            self._line(f"step {step}/{self.steps}", record, left)
        if self._bar is not None:
            self._bar.n = step
            self._draw(left)

    def microbatch(self, step: int, number: int, of: int, seconds: float) -> None:
        """Tell how far a step is that takes long.

        Args:
            step: that is being computed.
            number: of the microbatch that comes, from 1.
            of: how many this rank computes.
            seconds: since the step began.
        """
        now = time.monotonic()
        if seconds < SLOW or now - self._told_microbatches < SLOW:
            return
        self._told_microbatches = now
        told = f"microbatch {number} of {of}"
        if self._bar is not None:
            self._draw(f"step {step}: {told}, {_clock(seconds)}")
        else:
            log.info("step %d/%d %s, %s since it began", step, self.steps, told, _clock(seconds))

    def rewind(self, step: int) -> None:
        """Draw the bar back."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def before_save(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def close(self) -> None:
        """Leave the bar on the screen, and the rest of it to others."""
        self._screen.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, head: str, record: Mapping[str, Any], left: str) -> None:
        if self._bar is None:
            log.info("%s", " ".join([head, *_fields(record, _SHOWN), left]))
            return
        room = _columns() - 1 - len(head) - len(left) - 1
        line = " ".join([head, *_fitting(_fields(record, _TELLING), room), left])
        tqdm.write(line, file=sys.stderr)

    def _draw(self, end: str) -> None:
        """The bar, what was seen last behind it; ``end`` is always there."""
        assert self._bar is not None
        across = _columns() - 1
        room = across - 2 * len(str(self.steps)) - 5 - _BAR - len(end)
        told = " ".join([*_fitting(_fields(self._seen, _TELLING), room), end])
        self._bar.ncols = across
        self._bar.set_description_str(told)

    def _left(self, record: Mapping[str, Any]) -> str:
        step = record["step"]
        spent = statistics.fmean(self._spent)
        if self._live:
            spent = (time.monotonic() - self._started) / max(1, step - self._done_before)
        return _clock(spent * (self.steps - step))


def _columns() -> int:
    """Of the terminal behind stderr; 80 where it does not say."""
    found = columns()
    return max(found, NARROWEST) if found else 80


def _fields(record: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """``name value`` of those that the record has and that say something."""
    for name in names:
        if name in record and not (name in _HIDDEN_AT_ZERO and not record[name]):
            value = record[name]
            yield f"{name} {'not finite' if value is None else format(value, '.4g')}"


def _fitting(fields: Iterator[str], room: int) -> list[str]:
    """Those that have room, the first ones first, a blank before each; each whole."""
    kept: list[str] = []
    for field in fields:
        if len(field) + 1 <= room:
            room -= len(field) + 1
            kept.append(field)
    return kept


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
