"""A config as a flat record: ``train.stages[0].lr`` -> value; and two of them side by side."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

from data.config import DataConfig, SourceConfig
from train.config.schema import RunConfig, StageConfig, TrainConfig
from train.config.values import unknown_key

# Of a stage: from these the number and the position of every later step follow.
_PLACES = {"until_tokens", "global_batch_tokens", "ramp_from_tokens", "ramp_tokens"}
_RENAMED = {"engine": "engine.name"}  # what older records say
# What a stage takes from the train section where it says nothing itself; read nowhere else.
_DEFAULTED = ("seq_len", "global_batch_tokens", "micro_batch_size", "indexer_phase")


# What older code did where it had no such key: not what the default is today.
_BEFORE_THE_KEY = {"data.packing.pool_rows": 0}


class _Missing:
    """Stands for the value of a key that one side does not have."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


ABSENT = _Missing("absent")  # an item of a list or dict
GONE = _Missing("gone from this code")


def flat_config(run: RunConfig) -> dict[str, Any]:
    """Every key of a config with its value; JSON values."""
    return flatten(asdict(run))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested config by dotted keys, lists of sections by ``[number]``; JSON values."""
    return dict(_leaves(tree, ""))


def pairs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Every key with both values, in the order of ``now``.

    A key that one of them lacks has its default; so has one that is newer than the record, unless
    older code did something else. The value now of one that no config has any more is :data:`GONE`.
    """
    before, now = ({_RENAMED.get(k, k): v for k, v in side.items()} for side in (before, now))
    for key in dict.fromkeys([*now, *before]):
        default = _schema().get(_pattern(key), ABSENT)
        if key not in now and default is ABSENT and not _known(key):
            yield key, before[key], GONE
        else:
            older = _BEFORE_THE_KEY.get(key, default)
            yield key, before.get(key, older), now.get(key, default)


def still_to_come(
    before: Mapping[str, Any], now: Mapping[str, Any], done_tokens: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two configs of one run without what no step reads any more.

    Of a stage that is over only that counts which later steps are numbered by. What stages take
    from the ``train`` section is filled in.

    Args:
        before: config of what was trained.
        now: config with which it goes on.
        done_tokens: position that training has reached.
    """
    if not num_stages(before):
        return dict(before), dict(now)
    filled = _filled(before), _filled(now)
    for index in range(num_stages(before) - 1):  # the last one is evaluated in when it is over
        if before.get(f"train.stages[{index}].until_tokens", 0) > done_tokens:
            break
        for key in (f.name for f in fields(StageConfig) if f.name not in _PLACES):
            for config in filled:
                config.pop(f"train.stages[{index}].{key}", None)
    return filled


def num_stages(config: Mapping[str, Any]) -> int:
    """Items of ``train.stages``."""
    numbers = [re.match(r"train\.stages\[(\d+)\]", key) for key in config]
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    out = {k: v for k, v in config.items() if k.removeprefix("train.") not in _DEFAULTED}
    for index in range(num_stages(config)):
        for key in _DEFAULTED:
            if out.get(f"train.stages[{index}].{key}") is None:
                out[f"train.stages[{index}].{key}"] = config.get(f"train.{key}")
    return out


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and (key == "train.stages" or _holds_sections(value)):
        for number, child in enumerate(value):
            yield from _leaves(child, f"{key}[{number}]")
    elif isinstance(value, list):
        yield key, [item.value if isinstance(item, Enum) else item for item in value]
    elif isinstance(value, Enum):
        yield key, value.value
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, str(value)  # strict JSON has no number for it
    else:
        yield key, value


def _holds_sections(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, Mapping) for item in value)


@functools.cache
def _schema() -> dict[str, Any]:
    """Pattern of every key -> its default."""
    data = DataConfig(sources={"*": SourceConfig()})
    run = RunConfig(data=data, train=TrainConfig(stages=[StageConfig()]))
    return {_pattern(key): value for key, value in flat_config(run).items()}


def _pattern(key: str) -> str:
    """The key without numbers of stages and names of sources."""
    key = re.sub(r"^train\.stages\[\d+\]", "train.stages[*]", key)
    return re.sub(r"^data\.sources\..+\.(\w+)$", r"data.sources.*.\1", key)


def _known(key: str) -> bool:
    """Whether the key may stand in a config: as an item of a list or dict."""
    return unknown_key(re.sub(r"\[(\d+)\]", r".\1", key).split("."), RunConfig) is None
