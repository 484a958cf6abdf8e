"""Errors of ``data/`` that are told in one line."""

from __future__ import annotations

from conf.problems import ProblemsError


class ConfigError(ProblemsError):
    """A config key, or a file that a key names, cannot be; the text names it and the values.

    The user's: exit code 2.
    """


class DiskError(RuntimeError):
    """A disk is full: not the user's input, so one line with exit code 1; the text names it."""
