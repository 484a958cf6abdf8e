"""The parser of every command: its text keeps its lines, and each option shows its default."""

from __future__ import annotations

import argparse
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose help, that of its sub-commands too, tells every default."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

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
