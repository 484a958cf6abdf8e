"""``scripts/layouts.py`` and ``bench.py step_parts``: what they measure, and that bounds bite."""

import json
from dataclasses import replace

import pytest
import torch

from parallel.config import SCHEDULES
from scripts import layouts
from scripts.layout_trials.asked import parse
from scripts.layout_trials.reference import Reference
from scripts.layout_trials.step_parts import PARTS, Collective, Trace, TraceEvent, parts_of
from scripts.layout_trials.step_parts import main as step_parts
from scripts.layout_trials.whole_tensors import set_gradients
from scripts.layouts import BOUNDS, failures, main
from tests.parallel.ranks import alone
from tests.parallel.torchrun import SMALL_MODEL
from train.errors import ROOT

SMALL = ["--set", *SMALL_MODEL[1:], "--rows", "4", "--device", "cpu"]
REFERENCE = Reference({}, [], [], {}, {}, {}, {}, [], {"losses": [1e-6], "weights": [1e-2]})
GOOD = {"same_bits": True, "same_order": True} | {field: 1e-7 for field, _ in BOUNDS.values()}


@pytest.mark.core
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layout_is_read_with_schedule_and_microbatch(schedule):
    layout = parse(f"pp=2 dp_shard=4 ep=2 micro=1 schedule={schedule}")
    assert layout.keys == {"pp": "2", "dp_shard": "4", "ep": "2", "schedule": schedule}
    assert (layout.ranks, layout.micro) == (8, 1)


@pytest.mark.core
def test_the_page_put_together_by_hand_is_not_written_over(capsys):
    path = ROOT / "docs" / "layouts.md"
    before = path.read_bytes()
    assert main(["--markdown", str(path), "dp=2"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.core
@pytest.mark.parametrize("word", ["dp=2", "pp=0", "micro=x", "schedule=fast", "ep"])
def test_word_that_is_no_degree_is_refused(word):
    with pytest.raises(ValueError, match=f"'{word}' is none of dp_replicate=N"):
        parse(f"dp_shard=2 {word}")


@pytest.mark.core
def test_layout_that_cannot_be_leaves_with_2_before_anything_runs(capsys):
    assert main(["dp_shard=3", "--rows", "8"]) == 2
    assert "a batch of 8 rows" in capsys.readouterr().err
    assert main(["dp_shard=2 ep=3"]) == 2
    assert "parallel.ep=3 must divide" in capsys.readouterr().err


@pytest.mark.core
@pytest.mark.parametrize(
    ("field", "value", "column"),
    [
        ("same_bits", False, "same_bits"),
        ("same_order", False, "same_order"),
        ("loss", 2e-6, "loss"),
        ("gradient", 2e-5, "gradient"),
        ("update", float("nan"), "update"),
        ("replay_losses", 2e-5, "replayed"),
        ("free_losses", 4e-6, "free"),
        ("free_weights", 4e-2, "path"),
        ("bf16", 3e-2, "bf16"),
    ],
)
def test_every_bound_bites(field, value, column):
    assert failures(GOOD, REFERENCE) == []
    assert failures(GOOD | {field: value}, REFERENCE) == [column]


def test_layout_may_say_keys_of_the_engine():
    layout = parse("dp_shard=2 engine=deepspeed_zero1 engine.offload_optimizer=cpu")
    assert layout.more == ("engine.offload_optimizer=cpu",)
    assert (layout.engine, layout.ranks) == ("deepspeed_zero1", 2)


def test_clipping_leaves_the_reference_gradients_alone():
    """Else every other gradient is far from them, and float64 too, which excuses it."""
    engine = alone()
    given = {n: torch.ones_like(p) for n, p in engine.model.named_parameters()}
    set_gradients(engine, given)
    assert engine.optimizer_step(1e-3, finite=True).grad_norm > 1
    assert all((gradient == 1).all() for gradient in given.values())


def test_replayed_losses_of_a_quantised_run_are_held_to_the_noise_of_one_process():
    quantised = replace(REFERENCE, quantised=True, noise={"losses": [1e-5], "weights": [1e-2]})
    assert failures(GOOD | {"replay_losses": 2.9e-5}, quantised) == []
    assert failures(GOOD | {"replay_losses": 3.1e-5}, quantised) == ["replayed"]


def dies(rank, port, layout, args, corpus):
    """A rank of a layout that does not come to its end."""
    raise RuntimeError(f"rank {rank} of {layout.text} lost its link")


def test_layout_that_dies_is_a_broken_row_and_the_others_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(layouts, "on_rank", dies)
    asked = ["dp_shard=2", "dp_shard=1 micro=2", "--trials", "start", "--steps", "1"]
    assert main([*asked, "--orders", "0", *SMALL]) == 1
    _, died, measured, *_ = capsys.readouterr().out.splitlines()
    assert died.endswith("of dp_shard=2 lost its link)")
    assert measured.endswith("  ok")


def test_table_of_a_layout(tmp_path, capsys):
    """Every trial of expert parallelism on two ranks; a tiny model, two steps."""
    found = tmp_path / "found.json"
    args = ["dp_shard=2 ep=2", "--steps", "2", "--orders", "1", *SMALL, "--json", str(found)]
    assert main(args) == 0, capsys.readouterr().out
    (result,) = json.loads(found.read_text())["results"]
    assert result["ranks"] == 2
    assert result["broken"] == []
    assert {field for field, _ in BOUNDS.values()} <= result.keys()
    assert "dp_shard=2 ep=2" in capsys.readouterr().out


def test_table_that_broke_off_goes_on_and_other_options_are_refused(tmp_path, monkeypatch, capsys):
    found = tmp_path / "found.json"
    args = ["--steps", "1", "--orders", "0", "--trials", "start", *SMALL, "--json", str(found)]
    assert main(["dp_shard=1 micro=2", *args]) == 0
    monkeypatch.setattr(layouts, "on_rank", dies)
    assert main(["dp_shard=2", "dp_shard=1 micro=2", *args]) == 1
    monkeypatch.setattr(layouts, "measure", None)  # nothing is measured again
    assert main(["dp_shard=1 micro=2", *args]) == 0
    capsys.readouterr()
    assert main(["dp_shard=1 micro=2", *args, "--rows", "8"]) == 2
    assert "'rows': 4" in capsys.readouterr().err


def trace(shift, late):
    """Steps of 100 ms: gather at 10, rows sent at 30 and awaited at 40, an update of 20 at 60."""
    ms = 1e3

    def span(name, start, stop):
        return TraceEvent(name, (shift + start) * ms, (shift + stop) * ms)

    sent = span("c10d::alltoall_base_", 30, 31)
    return Trace(
        [span("step", 0, 100)],
        [span("optimizer", 60, 80)],
        [
            Collective(span("c10d::_allgather_base_", 10 + late, 20), 0, (shift + 10 + late) * ms),
            Collective(sent, 1, sent.start),
            Collective(span("_c10d_functional::wait_tensor", 40, 45), 1, sent.start),
            Collective(span("c10d::alltoall_base_", 65, 70), 2, (shift + 65) * ms),
        ],
    )


@pytest.mark.core
def test_parts_add_up_and_a_late_rank_makes_the_other_wait():
    early, late = parts_of([trace(0, 0), trace(0, 4)])
    expected = {"gather": 6, "dispatch": 6, "reduction": 0, "optimizer": 15, "exchange": 5}
    for parts, idle in ((early, 4), (late, 0)):
        assert set(parts) == set(PARTS)
        assert parts["idle"] == pytest.approx(idle / 1e3)
        for part, milliseconds in expected.items():
            assert parts[part] == pytest.approx(milliseconds / 1e3), part
        assert sum(parts.values()) == pytest.approx(0.1)


@pytest.mark.slow
def test_parts_of_real_traces(tmp_path):
    out = tmp_path / "parts"
    assert step_parts(["dp_shard=2 ep=2", "--steps", "1", *SMALL, "--out", str(out)]) == 0
    (ranks,) = json.loads((out / "step_parts.json").read_text()).values()
    for parts in ranks:
        assert all(parts[part] > 0 for part in PARTS if part != "idle")
    assert (out / "step_parts.png").stat().st_size > 1000
