"""The user's errors of ``data/``: told in one line, with exit code 2."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config key, or a file that a key names, cannot be; the text names it and the values."""
