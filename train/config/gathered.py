"""All that a command line cannot be, though one refusal hides another.

What is refused is taken off the command line and the rest is checked again, until nothing more is
refused: each time the run is one whose other values are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial

from conf.problems import ProblemsError
from train.config.schema import RunConfig
from train.errors import Problems, UserError

_AT_THE_TOP = {field.name for field in fields(RunConfig)}  # such a name is no last part of a key
# What the memory of a run depends on: without one of them another run would not fit.
_OF_MEMORY = ("model", "parallel", "train", "quant", "engine", "optim", "experiment")


def all_problems(
    first: ProblemsError,
    words: Sequence[str],
    readable: Sequence[str],
    check: Callable[[Sequence[str]], object],
) -> UserError:
    """The error of all problems of a command line.

    A problem is one of the command line's own only where it speaks of nothing that was taken off.

    Args:
        first: what is refused of all of it.
        words: its overrides.
        readable: those whose key and value are right by themselves.
        check: raises what is wrong with the run that some overrides describe.
    """
    problems = Problems()
    problems.of(lambda: _raise(first))
    told = first.args
    left = [word for word in words if word in readable]
    gone = [_key(word) for word in words if word not in left and not word.startswith("-")]
    fresh = len(left) < len(words)  # then what is left was not checked yet
    while (named := [w for w in left if any(_names(line, w) for line in told)]) or fresh:
        left = _without(named, left)
        gone += map(_key, named)
        if all(_key(word) == "run_dir" for word in left):
            break
        fresh, again = False, _again(problems, partial(check, left))
        told = [*again.lines, *(again.misfit.args if again.misfit else ())]
        problems.lines += [line for line in again.lines if not _speaks_of(line, gone)]
        if not any(key.split(".")[0] in _OF_MEMORY for key in gone):
            problems.misfit = problems.misfit or again.misfit
    try:
        problems.refuse()
    except UserError as error:
        return error
    raise AssertionError(first)


def _raise(error: ProblemsError) -> None:
    raise error


def _again(problems: Problems, check: Callable[[], object]) -> Problems:
    """What a check refuses; where it fails otherwise, what is known already goes first."""
    found = Problems()
    problems.of(lambda: found.of(check))
    return found


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _without(named: Sequence[str], words: Sequence[str]) -> list[str]:
    """The words without some, and without those that build on a group among them."""
    groups = [f"{_key(word)}." for word in named if "." not in _key(word)]
    return [
        word for word in words if word not in named and not _key(word).startswith(tuple(groups))
    ]


def _names(line: str, word: str) -> bool:
    """Whether a problem is, perhaps among others, one of a word of the command line."""
    key, _, value = word.partition("=")
    key = key.lstrip("+")
    if "." not in key:  # a group, or a key at the top
        return bool(re.search(rf"(?<![\w.]){re.escape(key)}(\.name)?=", line))
    return _speaks_of(line, [key])


def _speaks_of(line: str, keys: Iterable[str]) -> bool:
    """Whether a problem mentions a key, by its last part with a value too; of a group any key."""
    for key in keys:
        ends, leaf = r"(?!\w)" if "." in key else r"[.=]", key.rpartition(".")[2]
        if re.search(rf"(?<![\w.]){re.escape(key)}{ends}", line):
            return True
        if leaf not in _AT_THE_TOP and re.search(rf"(?<![\w.]){re.escape(leaf)}=", line):
            return True
    return False
