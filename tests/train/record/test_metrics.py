"""metrics.jsonl: stable names, a file that reads as if the run had never stopped, monitors as sums.

Oracle: hand counts, and numpy-free float64 formulas written out here.
"""

import json
import math
import os

import pytest
import torch

from train.errors import UserError
from train.record.metrics import (
    MEASURED,
    MetricsFile,
    load_values,
    metric_of,
    monitor_values,
    read_metrics,
    unmeasured,
)

PROMISED = (
    "step tokens loss loss_mtp loss_indexer loss_balance grad_norm lr tokens_per_second"
    " step_seconds peak_memory_bytes mfu val_loss val_bits_per_byte"
).split()


def test_promised_fields_are_in_the_table(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({name: 1 for name in PROMISED})
    assert sorted(read_metrics(file.path)[0]) == sorted(PROMISED)
    assert MEASURED >= {"tokens_per_second", "step_seconds", "peak_memory_bytes", "mfu"}
    assert not MEASURED & {"loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte", "tokens"}


def test_unknown_field_is_refused(tmp_path):
    with pytest.raises(KeyError, match="lossy"):
        MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1, "lossy": 2.0})


def test_families_of_fields_have_one_line():
    assert metric_of("quant_error_experts") is metric_of("quant_error_experts_input")
    assert metric_of("quant_scale_log2_experts").name == "quant_scale_log2_*"


def test_values_survive_to_the_last_bit_and_nan_is_null(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    loss = math.pi / 7
    file.write({"step": 1, "loss": loss, "grad_norm": math.nan, "lr": math.inf})
    assert read_metrics(file.path) == [{"step": 1, "loss": loss, "grad_norm": None, "lr": None}]
    assert "NaN" not in file.path.read_text()


@pytest.mark.core
@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo'])
def test_cut_keeps_what_the_checkpoint_knows(tmp_path, tail):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.write({"step": step, "loss": step / 3})
    with file.path.open("a") as handle:
        handle.write(tail)
    before = file.path.read_text().splitlines()[:3]
    file.cut(3)
    assert file.path.read_text().splitlines() == before
    file.write({"step": 4, "loss": 4 / 3})
    assert [r["step"] for r in read_metrics(file.path)] == [1, 2, 3, 4]
    file.cut(0)
    assert read_metrics(file.path) == []


def test_cut_without_a_file_makes_none(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").cut(3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_monitors_divide_sums_and_leave_out_what_was_not_counted():
    got = monitor_values(
        {
            "indexer_recall.sum": torch.tensor(3.0),
            "indexer_recall.count": torch.tensor(4.0),
            "clamped.sum": torch.tensor(0.0),
            "clamped.count": torch.tensor(0.0),
        }
    )
    assert got == {"indexer_recall": 0.75}
    with pytest.raises(KeyError, match="novelty"):
        monitor_values({"novelty.sum": torch.tensor(1.0), "novelty.count": torch.tensor(1.0)})


def test_load_values_match_the_formula():
    loads = {"a": torch.tensor([4.0, 0.0, 2.0, 2.0]), "b": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    got = load_values(loads)
    assert got["expert_load_cv"] == pytest.approx((math.sqrt(2.0) / 2.0 + 0.0) / 2)
    assert got["expert_load_max"] == 2.0
    assert got["dead_experts"] == 1
    assert load_values({}) == {}


def test_unmeasured_drops_only_measured_fields():
    record = {"step": 1, "loss": 2.0, "mfu": 0.3, "step_seconds": 1.0}
    assert unmeasured(record) == {"step": 1, "loss": 2.0}
    json.dumps(record)


@pytest.mark.parametrize(
    "end", ["\n", "  \n", '{"step": 3, "lo', '{"step": 3, "lo\n', "\x00\x00\n", "null\n"]
)
def test_broken_last_line_is_cut_as_a_kill_leaves_it(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + end)
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert MetricsFile(path).cut(2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
        read_metrics(path)


def test_cut_file_is_durable_before_it_takes_the_place(tmp_path, monkeypatch):
    """A checkpoint counts on its lines: losing power in between must not lose them."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    synced, replace, fsync = set(), os.replace, os.fsync

    def note(descriptor):
        synced.add((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def check(aside, final):
        assert (os.stat(aside).st_ino, os.stat(aside).st_size) in synced
        replace(aside, final)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    assert MetricsFile(path).cut(1) == 1
    assert os.stat(tmp_path).st_ino in {inode for inode, _ in synced}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
