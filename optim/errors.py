"""The user's errors of ``optim/``: told in one line, with exit code 2."""

from __future__ import annotations

from conf.problems import ProblemsError


class ConfigError(ProblemsError):
    """A config key, or a file that a key names, cannot be; the text names it and the values."""
