"""From a composed config to a RunConfig, and from that to YAML: every problem in one go."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import train.config.scaled  # noqa: F401  the resolver of conf/model/v4_scaled.yaml
from conf.problems import refuse
from conf.ranges import out_of_range
from model.errors import ConfigError
from train.config.across import checks_across
from train.config.schema import RunConfig
from train.errors import Problems, UserError

# Resolving the annotations of a section costs more than everything else in a check.
_types = functools.cache(get_type_hints)


def load(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a validated RunConfig.

    Raises:
        UserError: an unknown key, a wrong type, or values that cannot be together.
    """
    run = parse(cfg)
    validate(run)
    return run


def parse(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a RunConfig whose values are of the right types, no more.

    Raises:
        UserError: an unknown key, or a wrong type.
    """
    try:
        raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        _, refused, why = str(error).splitlines()[0].partition(f"{ConfigError.__name__} raised ")
        if refused:  # a rule of conf/ refused its own key (train/config/scaled.py)
            raise UserError(why.partition(": ")[2]) from error
        raise UserError(describe(error)) from error
    if isinstance(raw, dict) and isinstance(raw.get("engine"), str):
        raw["engine"] = {"name": raw["engine"]}  # as it was saved before it was a section
    refuse(UserError, _shape_problems(raw, RunConfig, ""))
    _refuse_bytes(raw, "")
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), raw))
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    assert isinstance(run, RunConfig)
    return run


def is_text(text: str) -> bool:
    """Whether it has a UTF-8 form: a lone surrogate, from bytes of another encoding, has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_bytes(value: Any, key: str) -> None:
    """Refuse a string that no file could hold, such as a path in another encoding."""
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_bytes(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _refuse_bytes(part, f"{key}[{number}]")
    elif isinstance(value, str) and not is_text(value):
        raise UserError(f"{key}={value!a} is not UTF-8")


def validate(run: RunConfig) -> None:
    """Check every section, then what must hold between them.

    Where a number is beyond its range, the sections that have none such are checked.

    Raises:
        ValueError: names the keys and both values.
    """
    problems, own = Problems(), out_of_range(run, "")
    problems.lines += own
    for name in ("model", "data", "optim", "quant", "parallel", "engine", "train"):
        if not any(line.startswith(f"{name}.") for line in own):
            problems.of(getattr(run, name).validate)
    if not own:
        problems.of(lambda: refuse(UserError, (text for ok, text in checks_across(run) if not ok)))
    problems.refuse()


def describe(error: OmegaConfBaseException) -> str:
    """One line for an error of the config library: the full key, what was given and wanted."""
    parts = (getattr(error, "full_key", None) or "config", str(error).splitlines()[0])
    return ": ".join(shown(part, 3 * _SHOWN) for part in parts)


def dump(run: RunConfig) -> str:
    """The resolved config as YAML, as written to a run folder's ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def unknown_key(path: Sequence[str], schema: Any, also: Sequence[str] = ()) -> str | None:
    """What to say of a dotted key that the schema does not have; None where it is known.

    Args:
        path: the parts of the key.
        schema: the dataclass it is looked up in; a part inside a list or dict is free.
        also: further names that would have been right at the top.
    """
    for depth, key in enumerate(path):
        if get_origin(schema) in (list, dict):
            schema = get_args(schema)[-1]
            continue
        if not is_dataclass(schema):
            return None if schema is Any else f"{'.'.join(path[:depth])} is one value, no section"
        own = [f.name for f in fields(schema)]
        known = [*own, *(name for name in also if depth == 0 and name not in own)]
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            prefix = "".join(f"{part}." for part in path[:depth])
            if near:
                return f"did you mean {prefix}{near[0]}?"
            return f"{prefix.rstrip('.') or 'the config'} has {', '.join(known)}"
        if key not in own:
            return None
        schema = _types(schema)[key]
    return None


def _shape_problems(raw: Any, schema: Any, path: str) -> Iterator[str]:
    """Unknown keys, and sections, lists or values where another of them belongs.

    Args:
        raw: plain dicts, lists and values.
        schema: a dataclass, or the annotation of a field.
        path: config path of ``raw``.
    """
    origin = get_origin(schema)
    if origin is list:
        if not isinstance(raw, list):
            yield f"{path}={shown(raw)} must be a list"
            return
        for index, item in enumerate(raw):
            yield from _shape_problems(item, get_args(schema)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(raw, dict):
            yield f"{path}={shown(raw)} must be NAME: VALUE pairs"
            return
        for name, item in raw.items():
            if not isinstance(name, str):
                yield f"{path}: {shown(name)} must be a name"
            yield from _shape_problems(item, get_args(schema)[1], f"{path}.{shown(name)}")
    elif is_dataclass(schema):
        if not isinstance(raw, dict):
            yield f"{path}={shown(raw)} must be KEY: VALUE pairs"
            return
        yield from _key_problems(raw, schema, path)
    elif isinstance(raw, list | dict):
        yield f"{path}={shown(raw)} must be one value"


def _key_problems(raw: dict[str, Any], schema: Any, path: str) -> Iterator[str]:
    """Of the keys of a section; arguments as of :func:`_shape_problems`."""
    types = _types(schema)
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        problem = unknown_key([str(key)], schema)
        if problem is not None:
            problem = problem.replace(
                "did you mean ", f"did you mean {full.removesuffix(str(key))}"
            )
            yield f"unknown config key {shown(full)}={shown(value)}: {problem}"
            continue
        yield from _shape_problems(value, types[key], full)


_SHOWN = 100  # characters


def shown(value: Any, most: int = _SHOWN) -> str:
    """A value in a message: on one line, and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:_SHOWN]}..."
