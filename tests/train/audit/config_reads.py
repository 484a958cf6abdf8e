"""Which config keys were read: a key that nothing reads is a wish that nobody fulfils.

While a config is watched, every section is an instance of a subclass of its own class that notes
each attribute access under its full key. Reads by ``validate``, by copies and by dumps don't count:
they touch every key whether or not anything uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

_NOT_A_USE = {
    "validate", "unused", "_problems", "asdict", "_asdict_inner", "replace", "__repr__", "__eq__",
    "deepcopy", "dump", "plain", "structured",
}  # fmt: skip
_DEPTH = 12  # callers looked at; a validation may sit several helpers above the read


class ConfigReads:
    """Watches a config from construction until :meth:`stop`.

    Args:
        config: a dataclass instance; its sections are watched too, in lists as well.
    """

    def __init__(self, config: Any) -> None:
        self.read: set[str] = set()
        self._watched: list[tuple[Any, type]] = []
        self._keys = [key for key, _ in leaves(config)]
        self._watch(config, "")

    def unread(self) -> list[str]:
        """Keys that nothing has read so far, in the order of the config."""
        return [key for key in self._keys if key not in self.read]

    def stop(self) -> None:
        """Give every section its own class back."""
        for section, own_class in self._watched:
            section.__class__ = own_class
        self._watched = []

    def _watch(self, section: Any, prefix: str) -> None:
        own_class = type(section)
        for f in fields(section):
            for name, child in _sections(f.name, getattr(section, f.name)):
                self._watch(child, f"{prefix}{name}.")
        names = {f.name for f in fields(section)}
        read = self.read

        def getattribute(self: Any, name: str) -> Any:
            if name in names and f"{prefix}{name}" not in read and _is_use():
                read.add(f"{prefix}{name}")
            return object.__getattribute__(self, name)

        watched = type(own_class.__name__, (own_class,), {"__getattribute__": getattribute})
        watched.__module__ = own_class.__module__
        section.__class__ = watched
        self._watched.append((section, own_class))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, not a section, with the value; records of a list once."""
    seen: set[str] = set()
    for f in fields(config):
        value = getattr(config, f.name)
        sections = list(_sections(f"{prefix}{f.name}", value))
        if not sections:
            yield f"{prefix}{f.name}", value
        for key, section in sections:
            for name, leaf in leaves(section, f"{key}."):
                if name not in seen:
                    seen.add(name)
                    yield name, leaf


def _sections(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Sections that a value holds, with their keys; those of a list share one key."""
    if is_dataclass(value) and not isinstance(value, type):
        yield key, value
    elif isinstance(value, list):
        yield from ((key, item) for item in value if is_dataclass(item))
    elif isinstance(value, dict):
        yield from ((f"{key}.{k}", item) for k, item in value.items() if is_dataclass(item))


def _is_use() -> bool:
    """Whether the read comes from code that uses the value."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame.f_code.co_name in _NOT_A_USE:
            return False
        if frame.f_back is None:
            return True
        frame = frame.f_back
    return True
