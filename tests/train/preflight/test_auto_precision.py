"""``train.precision=auto``: what is taken, that it is recorded and kept. Rates are planted."""

import json
import os
from dataclasses import replace

import pytest
import torch
import yaml

from tests.helpers import run_distributed
from tests.train.test_pretrain_cli import SHORT
from train.config.command_line import compose_run
from train.config.schema import Precision
from train.errors import ExitCode, UserError
from train.preflight import precision as auto_precision
from train.preflight.matmul_rate import matmul_rates
from train.preflight.precision import PrecisionChoice, measured_rates, settle
from train.preflight.world import World
from train.pretrain import cli

ONE = World(1, "cpu", 10**9)
FAST, SLOW = {"fp32": 1e11, "bf16": 5e11}, {"fp32": 1e11, "bf16": 0.55e11}


def never(run):
    raise AssertionError("measured where nothing was to be chosen")


def asked(tmp_path, *args):
    return compose_run(["model=v4_nano", f"run_dir={tmp_path}/run", *args])


def precisions(run):
    return run.train.precision.value, run.train.head_precision.value


@pytest.mark.parametrize(
    ("rates", "taken"),
    [(FAST, "bf16"), (SLOW, "fp32"), ({"fp32": 1e11, "bf16": 1.29e11}, "fp32"),
     ({"fp32": 1e11, "bf16": 1.31e11}, "bf16")],
)  # fmt: skip
def test_bf16_is_taken_where_it_gains_enough_and_the_head_follows(tmp_path, rates, taken):
    run, choice = settle(asked(tmp_path), ONE, lambda _: rates)
    assert precisions(run) == (taken, taken)
    assert choice.taken.value == taken
    assert choice.flops_per_second == (rates,)
    assert f"{rates['bf16'] / rates['fp32']:.2f} times as fast" in choice.why


def test_what_is_given_is_not_measured(tmp_path):
    for given, head in (("fp32", "fp32"), ("bf16", "bf16")):
        run, choice = settle(asked(tmp_path, f"train.precision={given}"), ONE, never)
        assert precisions(run) == (given, head)
        assert choice is None
    run, _ = settle(asked(tmp_path, "train.head_precision=fp32"), ONE, lambda _: FAST)
    assert precisions(run) == ("bf16", "fp32")


def test_a_head_in_bf16_needs_a_run_in_bf16(tmp_path):
    with pytest.raises(
        UserError, match=r"head_precision=bf16 needs train.precision=bf16, not auto"
    ):
        asked(tmp_path, "train.head_precision=bf16")


def test_tf32_is_refused_where_no_device_has_it(tmp_path, monkeypatch):
    run = asked(tmp_path, "train.precision=fp32", "train.head_precision=tf32")
    with pytest.raises(UserError, match=r"head_precision=tf32 needs .* computes on the cpu"):
        settle(run, ONE, never)
    there = World(1, "cuda", 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"head_precision=tf32 needs .* this one has 7\.5"):
        settle(run, there, never)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert precisions(settle(run, there, never)[0]) == ("fp32", "tf32")


def test_cuda_takes_what_its_devices_have(tmp_path, monkeypatch):
    for native, taken in ((True, Precision.bf16), (False, Precision.fp32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **_: native)
        run, choice = settle(asked(tmp_path), World(1, "cuda", 10**9), never)
        assert run.train.precision is choice.taken is taken


def test_a_damaged_record_is_the_users_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "config.yaml").write_text("train:\n  precision: auto\n")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: train\.precision is 'auto'"):
        settle(asked(tmp_path), ONE, never)


def test_a_run_records_what_it_took_and_keeps_it(tmp_path, monkeypatch, capsys):
    """The second machine would take the other one; asked for by name, it is another run."""
    args = [*SHORT, f"run_dir={tmp_path}/run", "train.precision=auto", "sample.tokens=0"]
    monkeypatch.setattr(auto_precision, "measured_rates", lambda run: FAST)
    assert cli(args) == ExitCode.finished
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["train"]["precision"] == "bf16"
    facts = json.loads((tmp_path / "run" / "receipt.json").read_text())["precision"]
    assert facts["taken"] == "bf16"
    assert facts["flops_per_second"] == [FAST]
    monkeypatch.setattr(auto_precision, "measured_rates", lambda run: SLOW)
    assert cli([*args, "train.steps=3"]) == ExitCode.finished
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert again["train"]["precision"] == "bf16"
    assert cli([*args, "train.steps=4", "train.precision=fp32"]) == ExitCode.user_error
    assert "train.precision=bf16, but now train.precision=fp32" in capsys.readouterr().err


def two_hosts(rank, world_size, folder):
    """Rank 0's host is fast, the other one slow; then a folder that rank 0 alone sees."""
    os.environ["LOCAL_RANK"] = "0"
    mine = compose_run(["model=v4_nano", f"run_dir={folder}/{rank}"])
    world = World(world_size, "cpu", 10**9)
    run, choice = settle(mine, world, lambda _: (FAST, SLOW)[rank])
    assert run.train.precision is Precision.fp32
    assert choice.flops_per_second == (FAST, SLOW)
    assert "on the slowest of 2 hosts" in choice.why
    run, _ = settle(mine, world, lambda _: FAST)
    assert run.train.precision is Precision.bf16
    if rank == 0:
        os.makedirs(f"{folder}/0")
        with open(f"{folder}/0/metrics.jsonl", "w") as metrics:
            metrics.write("{}\n")
        with open(f"{folder}/0/config.yaml", "w") as config:
            config.write("train: {precision: fp32}\n")
    run, choice = settle(mine, world, never)
    assert run.train.precision is Precision.fp32
    assert choice.flops_per_second == ()


def test_every_host_has_to_gain_and_rank_0s_record_holds_for_all(tmp_path):
    run_distributed(two_hosts, 2, str(tmp_path))


def test_rates_are_those_of_the_products_asked_for():
    rates = matmul_rates(torch.device("cpu"), [torch.float32], [(8, 16, 4)], seconds=0.0, least=1)
    assert 0 < rates[torch.float32] < 1e15
    run = replace(compose_run(["model=v4_tiny"]), run_dir="unused")
    assert sorted(measured_rates(run)) == ["bf16", "fp32"]
    assert PrecisionChoice(Precision.fp32, "x").flops_per_second == ()
