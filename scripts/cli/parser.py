"""The parser of every command: help with every default, and all problems of the options at once.

What a command line cannot be is a :class:`UserError` in our words, never a page of usage.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conf.ranges import Range
from train.errors import Problems, UserError

_LONGEST_NAME = 255  # bytes of one part of a path, on every file system
_KINDS = {int: "must be a whole number", float: "must be a number"}
# What argparse says, and how we say it; what it says otherwise is passed on.
_SAID = (
    (r"the following arguments are required: (.+)", r"\1: not given"),
    (r"unrecognized arguments: (.+)", r"\1: more than it takes"),
    (r"argument (\S+): expected one argument", r"\1 needs a value"),
    (r"argument (\S+): expected at least one argument", r"\1 needs a value or several"),
    (r"argument (\S+): expected (\d+) arguments", r"\1 needs \2 values"),
    (r"argument (\S+): ignored explicit argument (.+)", r"\1 takes no value, got \2"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2: give one of them"),
    (r"one of the arguments (.+) is required", r"one of these is needed: \1"),
    (r"ambiguous option: (.+) could match (.+)", r"\1 may be \2: write more of it"),
)


def whole(**bounds: float) -> Callable[[str], int]:
    """Type of an option that takes a whole number; ``bounds`` as of :class:`conf.ranges.Range`."""
    return partial(_number, int, Range(**bounds))


def real(**bounds: float) -> Callable[[str], float]:
    """Type of an option that takes a number; ``bounds`` as of :class:`conf.ranges.Range`."""
    return partial(_number, float, Range(**bounds))


def _number(kind: type, bounds: Range, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(_KINDS[kind]) from None
    if problem := bounds.problem(value, kind is int):
        raise argparse.ArgumentTypeError(problem)
    return value


class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose help, that of its sub-commands too, tells every default.

    Args:
        beyond: what to type instead of a word more than it takes, which stands for ``{}``.
        options: of ``ArgumentParser``.
    """

    def __init__(self, *, beyond: str = "", **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self._beyond = beyond
        self._wrong: dict[str, str] = {}  # option, or word, as typed -> what is wrong with it
        self._refused: set[str] = set()  # options whose values are
        self._taken = False  # a word was taken for the value of an option that there is not

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As its parent's; the help gets the default, where there is one and it does not say it."""
        action = super().add_argument(*names, **options)
        default, text = action.default, action.help or ""
        nothing = default is None or default is False or default in ("", [], argparse.SUPPRESS)
        if not (nothing or action.required or "(default" in text or text == argparse.SUPPRESS):
            several = isinstance(default, list | tuple)
            shown = " ".join(map(str, default)) if several else str(default)
            action.help = f"{text} (default: {shown.replace('%', '%%')})".strip()
        return action

    def read(
        self,
        words: Sequence[str] | None,
        *checks: Callable[[argparse.Namespace], object],
        intermixed: bool = False,
    ) -> argparse.Namespace:
        """The options that a command line gives, checked.

        Args:
            words: of the command line; None: of this process.
            checks: what must hold of the options, besides the type of each. An option whose value
                was refused has its default there, and stands in ``refused``.
            intermixed: words and options may stand in any order.

        Raises:
            UserError: all that is wrong with them.
        """
        parse = super().parse_intermixed_args if intermixed else super().parse_args
        problems, parsers = Problems(), [self, *self._children()]
        for parser in parsers:
            parser._wrong, parser._refused, parser._taken = {}, set(), False
        options = problems.of(lambda: parse(words))
        problems.lines[:0] = (f"{typed} {p._wrong[typed]}" for p in parsers for typed in p._wrong)
        if options is not None:
            options.refused = set().union(*(parser._refused for parser in parsers))
            for check in checks:
                problems.of(partial(check, options))
        problems.refuse()
        assert options is not None
        delattr(options, "refused")  # nothing was
        return options

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's; all problems are told at once."""
        assert namespace is None
        return self.read(args)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The same, with words and options in any order."""
        assert namespace is None
        return self.read(args, intermixed=True)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's, of the words that mean something."""
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the words are a sub-command's
            words = self._understood(words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> Any:
        """Raise what argparse has found, in our words."""
        for said, ours in _SAID:
            if re.fullmatch(said, message):
                told = re.sub(said, ours, message)
                break
        else:
            told = message
        if message.startswith("unrecognized") and self._beyond:
            told += f" (give {self._beyond.format(message.partition(': ')[2])})"
        lacks = "required" in message  # perhaps for what is told already
        if lacks and (self._taken or (message.startswith("one of") and self._wrong)):
            raise UserError
        raise UserError(f"{told}; it is {self._form()}, and --help tells more")

    def _form(self) -> str:
        """The command line with all that it must have."""
        words = [self.prog]
        for action in self._actions:
            name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
            if not action.option_strings:
                optional = action.nargs in ("?", "*")
                words.append(f"[{name}]" if optional else name)
            elif action.required:
                words.append(f"{action.option_strings[-1]} {name}")
        return " ".join([*words, "[OPTIONS]"])

    def _children(self) -> Iterator[CommandParser]:
        """The parsers of its sub-commands."""
        for action in self._subparsers._group_actions if self._subparsers else ():
            yield from getattr(action, "choices", {}).values()

    def _understood(self, words: Sequence[str]) -> list[str]:
        """The words without options that there are not, and without those that lack a value."""
        kept: list[str] = []
        left = list(words)
        while left:
            word = left.pop(0)
            if word == "--":
                return [*kept, word, *left]
            if not _is_option(word):
                kept.append(word)
                continue
            name, has_value, _ = word.partition("=")
            options = self._option_string_actions
            begun = [name] if name in options else [o for o in options if _begins(o, name)]
            meant = {id(options[o]): options[o] for o in begun}
            alone = not has_value and (not left or _is_option(left[0]))
            if not meant:
                near = difflib.get_close_matches(name, options, 1, 0.7)
                hint = f": did you mean {near[0]}?" if near else ""
                self._wrong.setdefault(name, f"is no option of {self.prog}{hint}")
                if not (has_value or alone):
                    left.pop(0)
                    self._taken = True
            elif alone and all(a.nargs is None for a in meant.values()) and len(meant) == 1:
                self._wrong.setdefault(name, "needs a value")
            else:
                kept.append(word)
        return kept

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            value = super()._get_value(action, arg_string)
            parts = value.parts if isinstance(value, Path) else ()
            if isinstance(value, Path) and not arg_string.strip():
                arg_string = repr(arg_string)
                raise argparse.ArgumentError(action, "names no file or folder")
            if any(len(os.fsencode(part)) > _LONGEST_NAME for part in parts):
                arg_string = f"{arg_string[:40]}..."
                raise argparse.ArgumentError(action, "is no path: it has a name of over 255 bytes")
            return value
        except argparse.ArgumentError as error:
            kind: Any = action.type
            self._wrong[f"{_name(action)} {arg_string}"] = _KINDS.get(kind, error.message)
            self._refused.add(action.dest)
            return action.default

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices or value is action.default:
            return
        choices = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(choices)}"
        if action.nargs == argparse.PARSER:
            raise UserError(f"{self.prog} has no command {value}: {hint}")
        self._wrong[f"{_name(action)} {value}"] = f"is none that it takes: {hint}"
        self._refused.add(action.dest)


def _name(action: argparse.Action) -> str:
    return (
        action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    )


def _is_option(word: str) -> bool:
    """Whether a word is an option as argparse sees it, and no negative number."""
    return bool(re.match(r"-(?!\.?\d)[^ ]+$|-(?!\.?\d)[^ =]+=", word))


def _begins(option: str, name: str) -> bool:
    """Whether ``name`` is an option or, of a long one, its beginning; ``-n5`` is ``-n`` with 5."""
    return option.startswith(name) if name.startswith("--") else option[:2] == name[:2]
