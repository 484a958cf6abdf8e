"""The range of each number of a config, declared with its field and checked by one function.

    warmup_steps: int = number(2000, least=0)

Each section's ``validate`` asks :func:`out_of_range` first, so what follows may divide by a size
that is above 0. A number without a range, in any section, fails a test.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

_KEY = "range"
_LARGEST_INT = 2**63 - 1  # what a tensor can hold


@dataclass(frozen=True)
class Range:
    """Bounds of a number; None = none.

    Attributes:
        least: the smallest value.
        above: every value is larger.
        most: the largest value.
        below: every value is smaller.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def problem(self, value: Any, whole: bool) -> str | None:
        """What is wrong with a value, as the end of a sentence; None: nothing.

        Args:
            value: anything; only numbers are right.
            whole: whether it must be an integer.
        """
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            return "must be a whole number" if whole else "must be a number"
        if whole and not -_LARGEST_INT <= value <= _LARGEST_INT:
            return "must fit 64 bits"
        # Tensors hold fp32: what is infinite there, or no longer above 0, is so here.
        try:
            rounded = value if whole else struct.unpack("f", struct.pack("f", value))[0]
        except OverflowError:
            rounded = math.inf
        if not math.isfinite(rounded):
            return "must be finite in fp32"
        holds = (
            self.least is None or value >= self.least,
            self.above is None or value > self.above < rounded,
            self.most is None or value <= self.most,
            self.below is None or value < self.below,
        )
        return None if all(holds) else f"must {self}"

    def __str__(self) -> str:
        """As in "x must ...": ``be above 0``, ``lie in [0, 1)``."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if high is None:
            if low is None:
                return "be a number"
            return f"be {low:g} or more" if self.above is None else f"be above {low:g}"
        left, right = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"lie in {left}{'-inf' if low is None else format(low, 'g')}, {high:.10g}{right}"


def number(
    default: float | list[Any] | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that holds a number, None, or a list of numbers; the range is of each.

    Args:
        default: value of the field.
        least: the smallest value.
        above: every value is larger.
        most: the largest value.
        below: every value is smaller.
    """
    metadata = {_KEY: Range(least, above, most, below)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def out_of_range(section: Any, path: str) -> list[str]:
    """The numbers of a section, or of one inside it, that lie outside their range.

    Args:
        section: a dataclass instance.
        path: its config path, for the message.

    Returns:
        A line each, with key, value and range; none: all are right.
    """
    return list(_problems(section, path))


def _problems(section: Any, path: str) -> Iterator[str]:
    for f in fields(section):
        value, key = getattr(section, f.name), f"{path}.{f.name}" if path else f.name
        whole = "int" in str(f.type)  # the annotation as it is written
        for name, item in _items(key, value):
            if is_dataclass(item):
                yield from _problems(item, name)
            elif _KEY in f.metadata and item is not None:
                problem = f.metadata[_KEY].problem(item, whole)
                if problem:
                    yield f"{name}={item} {problem}"


def _items(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", item) for name, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"{key}[{index}]", item) for index, item in enumerate(value))
    else:
        yield key, value
