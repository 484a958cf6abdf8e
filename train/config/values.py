"""What each key of a config takes, and what is wrong with a value or a key, in words."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import OmegaConfBaseException

from train.config.schema import RunConfig

# Resolving the annotations of a section costs more than everything else in a check.
_types = functools.cache(get_type_hints)
# The nodes that convert a composed value: what they take is right.
_NODES: dict[Any, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_SHOWN = 100  # characters
_LISTED = 20  # keys; of a longer section they are asked for by a command


def shown(value: Any, most: int = _SHOWN) -> str:
    """A value in a message: on one line, and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:_SHOWN]}..."


def type_of(path: Sequence[str]) -> Any:
    """Annotation of a dotted key of a run, inside lists and dicts too; None where there is none."""
    schema: Any = RunConfig
    for part in path:
        if is_dataclass(schema):
            schema = _types(schema).get(part)
        elif get_origin(schema) in (list, dict):
            schema = get_args(schema)[-1]
        else:
            return None
    return schema


def holds_text(path: Sequence[str]) -> bool:
    """Whether a key of a run is a text, as paths and prompts are."""
    return str in _alternatives(type_of(path))


def _alternatives(schema: Any) -> tuple[Any, ...]:
    return get_args(schema) if get_origin(schema) in (Union, UnionType) else (schema,)


def unknown_key(path: Sequence[str], schema: Any, also: Sequence[str] = ()) -> str | None:
    """What to say of a dotted key that the schema does not have; None where it is known.

    Args:
        path: the parts of the key.
        schema: the dataclass it is looked up in; a part inside a dict is free.
        also: further names that would have been right at the top.
    """
    for depth, key in enumerate(path):
        before = ".".join(path[:depth])
        if get_origin(schema) is list and not key.isdecimal():
            return f"{before} is a list: give all of it, or the number of an item, {before}.0"
        if get_origin(schema) in (list, dict):
            schema = get_args(schema)[-1]
            continue
        if not is_dataclass(schema):
            return None if schema is Any else f"{before} is one value, no section"
        own = [f.name for f in fields(schema)]
        known = [*own, *(name for name in also if depth == 0 and name not in own)]
        if key not in known:
            return _hint(key, known, before)
        if key not in own:
            return None
        schema = _types(schema)[key]
    return None


def _hint(key: str, known: Sequence[str], section: str) -> str:
    """The key that is near, else those that there are."""
    near = difflib.get_close_matches(key, known, 1, 0.7) or [k for k in known if k.startswith(key)]
    if near and key:
        return f"did you mean {f'{section}.' if section else ''}{near[0]}?"
    if len(known) <= _LISTED:
        return f"{section or 'the config'} has {', '.join(known)}"
    shows = f"v4 pretrain --cfg job --package {section}"
    return f"none of the {len(known)} keys of {section} is like it; {shows} shows them"


def shape_problems(raw: Any, schema: Any, path: str) -> Iterator[str]:
    """Unknown keys, and values that are not what their key takes.

    Args:
        raw: plain dicts, lists and values; a text with ``${`` is not known yet.
        schema: a dataclass, or the annotation of a field.
        path: config path of ``raw``.
    """
    origin = get_origin(schema)
    if origin is list:
        if not isinstance(raw, list):
            yield f"{path}={shown(raw)} must be a list"
            return
        for index, item in enumerate(raw):
            yield from shape_problems(item, get_args(schema)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(raw, dict):
            yield f"{path}={shown(raw)} must be NAME: VALUE pairs"
            return
        for name, item in raw.items():
            if not isinstance(name, str):
                yield f"{path}: {shown(name)} must be a name"
            yield from shape_problems(item, get_args(schema)[1], f"{path}.{shown(name)}")
    elif is_dataclass(schema):
        if not isinstance(raw, dict):
            yield f"{path}={shown(raw)} must be KEY: VALUE pairs"
            return
        yield from _key_problems(raw, schema, path)
    elif schema is not Any and not _takes(schema, raw):
        yield f"{path}={shown(_as_typed(raw))} must be {_wanted(schema)}"


def _key_problems(raw: dict[str, Any], schema: Any, path: str) -> Iterator[str]:
    """Of the keys of a section; arguments as of :func:`shape_problems`."""
    types = _types(schema)
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        if key in types:
            yield from shape_problems(value, types[key], full)
        else:
            hint = _hint(str(key), list(types), path)
            yield f"unknown config key {shown(full)}={shown(value)}: {hint}"


def _takes(schema: Any, value: Any) -> bool:
    """Whether one value is, or is written as, what an annotation says."""
    kinds = _alternatives(schema)
    if value is None:
        return NoneType in kinds
    if isinstance(value, str) and "${" in value:
        return True
    if isinstance(value, list | dict):
        return False
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    if kind is bool and isinstance(value, int) and value not in (0, 1):
        return False
    try:
        if issubclass(kind, Enum):
            EnumNode(kind, str(value))
        else:
            _NODES[kind](value)
    except OmegaConfBaseException:
        return False
    return True


def _wanted(schema: Any) -> str:
    kinds = _alternatives(schema)
    (kind,) = (kind for kind in kinds if kind is not NoneType)
    words = _WORDS.get(kind) or "one of " + ", ".join(member.name for member in kind)
    return f"{words}, or null" if NoneType in kinds else words


def _as_typed(value: Any) -> Any:
    """A value as YAML writes it, where Python writes another word."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else value
