"""The verdict on the gates over a run, and that the receipt and the console have it.

4 experts, 2 a token: a gate's load is 2 times the mean at most, and 1.8 is nearly all of it.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import Router
from model.moe.router import Gate
from tests.helpers import small_config
from tests.integration.small_run import small_run, write_corpus
from train.build import build
from train.record.gates import gates_over_the_run
from train.record.metrics import metric_of

MODEL = small_config()


def records(*stretches, tokens=1000):
    """Steps of several stretches: (how many, load, idle experts)."""
    values = [(load, dead) for count, load, dead in stretches for _ in range(count)]
    return [
        {"step": n, "tokens": n * tokens, "expert_load_max": load, "dead_experts": dead}
        for n, (load, dead) in enumerate(values, start=1)
    ]


def test_a_gate_that_comes_back_is_counted_and_not_warned_of():
    verdict, warnings = gates_over_the_run(records((30, 1.9, 1), (20, 1.2, 0)), MODEL)
    assert (verdict["steps"], verdict["collapsed_steps"]) == (50, 30)
    assert verdict["steps_with_idle_experts"] == 30
    assert verdict["stays"] == warnings == []


@pytest.mark.parametrize(
    ("load", "dead", "stays"),
    [
        (1.8, 0, ["expert_load_max"]),
        (1.2, 1, ["dead_experts"]),
        (2.0, 2, ["expert_load_max", "dead_experts"]),
        (None, None, []),
        (1.79, 0, []),
    ],
)
def test_what_holds_to_the_end_is_told_with_its_remedy(load, dead, stays):
    lines = records((20, 1.2, 0), (10, load, dead))
    verdict, warnings = gates_over_the_run(lines, MODEL)
    assert verdict["stays"] == stays
    assert [text.rpartition("; ")[2] for text in warnings] == [metric_of(m).advice for m in stays]
    assert gates_over_the_run(lines[:-1], MODEL)[0]["stays"] == [], "nine steps are no sign"


def test_what_cannot_be_judged_is_no_collapse():
    """One expert gets everything by right; 15 copies an expert leave some idle by chance."""
    one = replace(MODEL, n_routed_experts=1, num_experts_per_tok=1)
    assert gates_over_the_run(records((20, 1.0, 0)), one)[0]["stays"] == []
    assert gates_over_the_run(records((20, 1.2, 1), tokens=30), MODEL)[0]["stays"] == []
    verdict, warnings = gates_over_the_run([{"step": 1, "tokens": 9}] * 20, MODEL)
    assert (verdict["collapsed_steps"], verdict["stays"], warnings) == (0, [], [])
    assert gates_over_the_run([], MODEL)[0]["steps"] == 0


def test_last_step_above_twice_the_mean():
    wide = replace(MODEL, n_routed_experts=8)
    lines = records((5, 3.0, 0), (5, 1.5, 0), (1, 2.1, 0), (9, 2.0, 0))
    assert gates_over_the_run(lines, wide)[0]["last_step_above_twice_the_mean"] == 11


def test_receipt_and_console_of_a_run_have_the_verdict(tmp_path, caplog):
    """A bias that nothing moves gives every token to the same two experts."""
    corpus = write_corpus(tmp_path)
    run = small_run(tmp_path / "run", corpus, steps=10, eval_every=0, bias_update_speed=0.0)
    trainer = build(run)
    for module in trainer.engine.model.modules():
        if isinstance(module, Gate) and module.router is Router.learned:
            module.bias.copy_(torch.tensor([8.0, 8.0, 0.0, 0.0]))
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    gates = json.loads((Path(run.run_dir) / "receipt.json").read_text())["audit"]["gates"]
    assert (gates["steps"], gates["collapsed_steps"]) == (10, 10)
    assert gates["stays"] == ["expert_load_max", "dead_experts"]
    told = [m for m in caplog.messages if m.startswith("audit, over the run: ")]
    assert len(told) == 2
    assert "2 times the mean of 2 that are possible" in told[0]
