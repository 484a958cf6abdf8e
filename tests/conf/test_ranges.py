"""Every number of a run's config has a range, is finite, and is refused outside it by its key."""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from conf.ranges import Range, number, out_of_range
from data.config import SourceConfig, SourceKind
from optim.config import NewtonSchulzIterations
from train.config.command_line import compose_run
from train.config.load import validate
from train.config.schema import RunConfig, StageConfig
from train.errors import USER_ERRORS

pytestmark = pytest.mark.core


@dataclass
class Inner:
    share: float = number(0.5, above=0, most=1)


@dataclass
class Outer:
    count: int = number(3, least=1)
    anything: float = number(0.0)
    maybe: int | None = number(None, least=0)
    listed: list[float] = number([0.1, 0.2], least=0, below=1)
    inner: Inner = field(default_factory=Inner)
    named: dict[str, Inner] = field(default_factory=dict)
    stages: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"maybe": 0}, None),
        ({"anything": -1e30}, None),
        ({"count": 0}, "s.count=0 must be 1 or more"),
        ({"count": True}, "s.count=True must be a whole number"),
        ({"count": 2.0}, "s.count=2.0 must be a whole number"),
        ({"count": 2**63}, f"s.count={2**63} must fit 64 bits"),
        ({"anything": math.nan}, "s.anything=nan must be finite in fp32"),
        ({"anything": -math.inf}, "s.anything=-inf must be finite in fp32"),
        ({"anything": 1e39}, "s.anything=1e+39 must be finite in fp32"),
        ({"anything": "x"}, "s.anything=x must be a number"),
        ({"maybe": -1}, "s.maybe=-1 must be 0 or more"),
        ({"listed": [0.0, 1.0]}, "s.listed[1]=1.0 must lie in [0, 1)"),
        ({"inner": Inner(0.0)}, "s.inner.share=0.0 must lie in (0, 1]"),
        ({"inner": Inner(1e-60)}, "s.inner.share=1e-60 must lie in (0, 1]"),
        ({"named": {"a": Inner(2.0)}}, "s.named.a.share=2.0 must lie in (0, 1]"),
        ({"stages": [Inner(), Inner(-1.0)]}, "s.stages[1].share=-1.0 must lie in (0, 1]"),
    ],
)
def test_value_outside_its_range_is_named(change, message):
    assert out_of_range(Outer(**change), "s") == ([message] if message else [])


def test_range_reads_as_a_sentence():
    told = [str(r) for r in (Range(), Range(least=1), Range(above=0), Range(least=0, most=1e9))]
    assert told == ["be a number", "be 1 or more", "be above 0", "lie in [0, 1000000000]"]


def numbers_of(schema: Any, path: str = "") -> list[tuple[str, bool]]:
    """Every number of a schema: its key, and whether it has a range."""
    found = []
    hints = get_type_hints(schema)
    for f in fields(schema):
        kinds = {hints[f.name], *get_args(hints[f.name])}
        for kind in kinds:
            if is_dataclass(kind):
                found += numbers_of(kind, f"{path}{f.name}.")
        if kinds & {int, float}:
            found.append((f"{path}{f.name}", "range" in f.metadata))
        assert get_origin(hints[f.name]) is not dict or str in kinds, f.name
    return found


def test_every_number_of_a_run_has_a_range():
    found = numbers_of(RunConfig)
    assert len(found) > 90
    assert [key for key, has_range in found if not has_range] == []


# Where -1 is a value: the rest of the world, or a number of any sign.
SIGNED = {f"parallel.{degree}" for degree in ("dp_replicate", "dp_shard")} | {
    "model.hc_identity_base"
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 2**128, -1])
def test_every_number_refuses_what_no_run_can_have(value):
    run = compose_run()
    run.train.stages = [StageConfig(until_tokens=10**9)]
    run.data.sources = {"a": SourceConfig(kind=SourceKind.text, path="x", weight=1.0)}
    run.optim.muon.newton_schulz = [NewtonSchulzIterations(steps=10)]
    for key, _ in numbers_of(RunConfig):
        section, leaf = run, key.rpartition(".")[2]
        for name in key.split(".")[:-1]:
            section = getattr(section, name)
            if isinstance(section, dict | list):
                section = section["a"] if isinstance(section, dict) else section[0]
        before = getattr(section, leaf)
        if value == -1 and (
            key in SIGNED or key.endswith((".newton_schulz.b", ".newton_schulz.c"))
        ):
            continue
        setattr(section, leaf, [value, *before[1:]] if isinstance(before, list) else value)
        with pytest.raises(
            USER_ERRORS, match=rf"\b{leaf}(\[0\])?={re.escape(str(value))}"
        ) as caught:
            validate(run)
        assert "\n" not in str(caught.value)
        setattr(section, leaf, before)
    validate(run)


@pytest.mark.parametrize(
    "args",
    [
        ["model.rope_theta=0"],
        ["model.rms_norm_eps=-1"],
        ["model.hc_eps=-1"],
        ["model.initializer_range=-0.02"],
        ["model.routed_scaling_factor=0"],
        ["optim.lr=inf"],
        ["train.recovery.threshold=nan"],
        ["seed=18446744073709551616"],
        ["train.stages=[{until_tokens: 8, lr: nan}]"],
        ["data.sources.a.kind=text", "data.sources.a.path=x", "data.sources.a.weight=nan"],
        ["optim.muon.newton_schulz=[{steps: 1, a: 1.0, b: inf, c: 0.0}]"],
    ],
)
def test_number_that_cannot_be_is_one_line(args):
    with pytest.raises(USER_ERRORS, match=" must ") as caught:
        compose_run(args)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(args[-1].partition("=")[0])
