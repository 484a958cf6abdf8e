"""From a composed config to a RunConfig, and from that to YAML: every problem in one go."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

import train.config.scaled  # noqa: F401  the resolver of conf/model/v4_scaled.yaml
from conf.problems import refuse
from conf.ranges import out_of_range
from model.errors import ConfigError
from train.config.across import checks_across
from train.config.schema import RunConfig
from train.config.values import shape_problems, shown
from train.errors import Problems, UserError


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
    refuse(UserError, shape_problems(raw, RunConfig, ""))
    _refuse_bytes(raw, "")
    try:
        run = OmegaConf.to_object(OmegaConf.merge(_schema(), raw))
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    assert isinstance(run, RunConfig)
    return run


@cache
def _schema() -> DictConfig:
    """What a run's config may hold; a merge copies it."""
    return OmegaConf.structured(RunConfig)


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
    """One line for an error of the config library: the full key, and what is wrong there."""
    key, text = getattr(error, "full_key", None) or "config", str(error).splitlines()[0]
    named = re.search(r"'([^']*)'", text)
    if isinstance(error, InterpolationKeyError) and named:
        text = f"${{{named[1]}}} names no key"
    elif isinstance(error, UnsupportedInterpolationType):
        text = f"${{{text.split()[-1]}:...}} names no function"
    elif isinstance(error, MissingMandatoryValue):
        text = "??? stands for a value that must be given"
    elif isinstance(error, GrammarParseError):
        text = "a ${ that is not closed, or not of the form ${KEY}"
    elif "Recursive interpolation" in text:
        text = "${...} leads back to itself"
    elif missing := re.search(r"Environment variable '([^']*)' not found", text):
        text = f"environment variable {missing[1]} is not set"
    return ": ".join(shown(part, 300) for part in (key, text))


def dump(run: RunConfig) -> str:
    """The resolved config as YAML, as written to a run folder's ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))
