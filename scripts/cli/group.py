"""Commands by name: what a list of them looks like, and how one of them is run."""

from __future__ import annotations

import ast
import difflib
import faulthandler
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from train.errors import ExitCode, UserError, ends_when_unread
from train.recovery.stop import Stopped, leave_on_signal
from train.terminal import wrapped


def show_list(about: str | None, what: str, commands: Mapping[str, str]) -> int:
    """Print what a group of commands is for, and the commands.

    Args:
        about: the group's own text.
        what: they are called.
        commands: name -> module.
    """

    def show() -> int:
        print(f"{(about or '').strip()}\n\n{what}:\n{listing(commands)}")
        return ExitCode.finished

    return ends_when_unread(show)


def listing(commands: Mapping[str, str]) -> str:
    """One line a command: its name, and the first sentence of its module; nothing is imported.

    Args:
        commands: name -> module.
    """
    width = max(map(len, commands))
    return "\n".join(f"  {name:{width}}  {_summary(module)}" for name, module in commands.items())


def run_command(
    prog: str,
    commands: Mapping[str, str],
    moved: Mapping[str, str],
    name: str,
    words: Sequence[str],
    meant: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Import a command's module and call it with its words.

    Args:
        prog: what stands before the name on the command line.
        commands: name -> module, or module:function; the function is ``main`` by default.
        moved: names of before -> how they are called now.
        name: of the command; ``-`` is taken for ``_``.
        words: what follows the name.
        meant: other words for commands -> how they are called.

    Returns:
        The command's exit code; 2: there is none of that name.
    """
    if name.startswith("-"):
        told = f"{name} is no flag of {prog}: {prog} --help lists its commands"
        sys.stderr.write(wrapped(f"error: {told}\n"))
        return ExitCode.user_error
    name = name.replace("-", "_")
    if name not in commands:
        sys.stderr.write(wrapped(f"error: {_unknown(prog, commands, moved, name, meant)}\n"))
        return ExitCode.user_error
    leave_on_signal()  # a signal during the imports below is answered too
    if not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__ or sys.stderr)  # a crash of native code says where
    try:
        module, _, function = commands[name].partition(":")
        sys.argv = [f"{prog} {name}", *words]
        return getattr(import_module(module), function or "main")(words)
    except Stopped:
        return ExitCode.resumable


def _unknown(
    prog: str,
    commands: Mapping[str, str],
    moved: Mapping[str, str],
    name: str,
    meant: Mapping[str, str],
) -> UserError:
    if name in moved:
        return UserError(f"{prog} {name} is called {prog} {moved[name]} now")
    if name in meant:
        return UserError(f"{prog} has no command {name}: did you mean {prog} {meant[name]}?")
    near = difflib.get_close_matches(name, commands, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
    return UserError(f"{prog} has no command {name}: {hint}")


def _summary(module: str) -> str:
    spec = find_spec(module.partition(":")[0])
    text = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].splitlines()[0]
