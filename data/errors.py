"""Errors of ``data/`` that are told in one line."""

from __future__ import annotations

from conf.problems import ProblemsError


class ConfigError(ProblemsError):
    """A config key, or a file that a key names, cannot be; the text names it and the values.

    The user's: exit code 2.
    """


class DiskError(RuntimeError):
    """A disk is full, or cannot be written any more: one line with exit code 1; the text names it.

    It is not the user's input that is wrong.
    """
