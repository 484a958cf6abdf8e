"""What a run warns of: each sign once an episode, with the remedy of the table; nothing else."""

import logging
import re

import pytest

from docs.metrics import DOCUMENT, document
from tests.helpers import small_config
from train.config.schema import RunConfig
from train.config.values import unknown_key
from train.display.health import Health
from train.record.metrics import METRICS, metric_of

MODEL = small_config()  # 4 experts, 2 a token: a gate's load is 2 at most
WELL = {"loss": 3.0, "grad_norm": 1.0, "expert_load_max": 1.2, "dead_experts": 0}
BAD = {
    "expert_load_max": ({"expert_load_max": 2.0}, 10),
    "dead_experts": ({"dead_experts": 2}, 10),
    "grad_norm": ({"grad_norm": 40.0}, 3),
    "stream_gain": ({"stream_gain": 9.0}, 2),
    "val_loss": ({"val_loss": 3.3}, 2),
}  # what shows each sign, and for how many records


def records(*stretches, tokens=1000):
    """Steps of several stretches: (how many, what they hold besides WELL)."""
    values = [more for count, more in stretches for _ in range(count)]
    return [
        {"step": n, "tokens": n * tokens, **WELL, **more} for n, more in enumerate(values, start=1)
    ]


def shown(lines, history=()):
    health = Health(MODEL, lambda: list(history))
    for record in lines:
        health.show(record)
    return health


def well_with(sign):
    return {"val_loss": 3.0} if sign == "val_loss" else {"stream_gain": 1.0}


@pytest.mark.parametrize("sign", list(BAD))
def test_each_sign_is_told_once_an_episode_with_its_remedy(sign, caplog):
    bad, patience = BAD[sign]
    good = well_with(sign)
    lines = records((20, good), (3 * patience, bad), (20, good), (3 * patience, bad))
    health = shown(lines)
    steps = [step for step, _ in health.warnings]
    assert steps == [20 + patience, 20 + 3 * patience + 20 + patience]
    for (step, text), message in zip(health.warnings, caplog.messages, strict=True):
        assert message == f"warning, step {step}: {text}"
        assert text.endswith(metric_of(sign).advice)


@pytest.mark.parametrize("sign", list(BAD))
def test_what_passes_in_a_moment_is_not_told(sign):
    bad, patience = BAD[sign]
    good = well_with(sign)
    assert shown(records((20, good), (patience - 1, bad), (20, good))).warnings == []


@pytest.mark.parametrize("sign", list(BAD))
def test_values_that_are_not_finite_count_as_bad_or_say_nothing(sign):
    bad, patience = BAD[sign]
    lines = records((20, well_with(sign)), (patience + 1, {name: None for name in bad}))
    told = [text for _, text in shown(lines).warnings]
    assert len(told) == (sign in ("grad_norm", "val_loss"))


def test_a_healthy_run_hears_nothing(caplog):
    assert shown(records((60, {"val_loss": 2.0, "stream_gain": 1.2}))).warnings == []
    assert caplog.text == ""


def test_idle_experts_of_small_steps_are_chance():
    """30 tokens a step make 15 copies for each of 4 experts."""
    assert shown(records((60, {"dead_experts": 1}), tokens=30)).warnings == []


@pytest.mark.parametrize("at", [5, 21, 29, 30, 31, 45])
def test_a_resumed_run_says_what_the_whole_one_would_have(at, caplog):
    lines = records((20, {}), (30, BAD["dead_experts"][0]))
    whole = shown(lines).warnings
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resumed = shown(lines[at:], history=lines[:at])
    assert resumed.warnings == whole
    assert len(caplog.messages) == sum(step > at for step, _ in whole)


def test_a_rollback_takes_its_warnings_back():
    lines = records((20, {}), (12, BAD["dead_experts"][0]))
    kept = []
    health = Health(MODEL, lambda: kept)
    for record in lines:
        health.show(record)
    assert len(health.warnings) == 1
    kept += lines[:25]
    health.rewind(25)
    assert health.warnings == []


# ---- the table -----------------------------------------------------------------------------------
def test_the_document_is_current():
    assert DOCUMENT.read_text() == document(), "python docs/metrics.py"
    for metric in METRICS:
        assert f"| `{metric.name}` |" in document()


def test_every_metric_says_what_it_is_and_what_to_do():
    for metric in METRICS:
        assert metric.unit, metric.name
        assert bool(metric.healthy) == bool(metric.advice), metric.name


def test_advice_names_keys_that_exist():
    keys = {
        key for m in METRICS
        for key in re.findall(r"\b((?:train|optim|model|quant|data)(?:\.\w+)+)", m.advice)
    }  # fmt: skip
    assert len(keys) > 10
    for key in keys:
        assert unknown_key(key.split("."), RunConfig) is None, key
