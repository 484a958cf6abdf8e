"""ZeRO 3 with weights and optimizer state in swap files, through a double of the aio op.

Bounds are those of test_deepspeed.py: what lies where changes no bit of the update.
"""

import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.cache import DiskError
from parallel.collectives import whole
from parallel.config import OffloadTo
from parallel.errors import ConfigError
from tests.helpers import random_rows, run_distributed
from tests.parallel import aio_double
from tests.parallel.ranks import SEQ_LEN, alone, forward_backward
from tests.parallel.test_deepspeed import ROWS, compare_engines, compare_step, zero
from train.config.command_line import compose_run
from train.preflight import fit
from train.preflight.engine import check_engine
from train.stages import resolve

NVME = OffloadTo.nvme
SMALL_BLOCKS = {"aio": {"block_size": 1024}}  # of the reads and writes


def swapping(folder, parameters):
    folder.mkdir(exist_ok=True)
    own = folder / "ds.json"
    own.write_text(json.dumps(SMALL_BLOCKS))
    return zero(3, NVME, offload_parameters=parameters, nvme_path=str(folder), config=str(own))


def on_rank(rank, world, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    folder = folder / f"rank{rank}"  # as a drive of its own
    rows = random_rows(ROWS, SEQ_LEN, alone().model.config.vocab_size)
    for parameters in (OffloadTo.none, NVME):
        aio_double.install()
        reference, engine = alone(), swapping(folder, parameters)
        before = aio_double.Handle.written
        compare_step(engine, reference, rows, 2)
        compare_engines(engine, reference, rows, 2)
        assert aio_double.Handle.written > before
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) > 1024
    full_drive_costs_a_line_and_no_data(engine, rows)
    aio_double.install(1 << 40)
    with pytest.raises(ConfigError, match=r"leaves pieces below 1 MiB in host memory"):
        swapping(folder, OffloadTo.none)


def full_drive_costs_a_line_and_no_data(engine, rows):
    """Files that may not grow stand for a drive that is full."""
    saved = {name: whole(tensor).clone() for name, tensor in engine.state().items()}
    for file in Path(engine.config.nvme_path).rglob("*.swp"):
        file.unlink()  # so that each must grow
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"engine.nvme_path=.*: File too large: a swap file"):
            train_on(engine, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = zero(3, OffloadTo.cpu)  # from what was saved, without the drive
    again.take_up(saved)
    train_on(again, rows)


def train_on(engine, rows):
    forward_backward(engine, rows, ROWS, 2)
    assert engine.optimizer_step(1e-2, finite=True).applied


def test_swapped_update_is_that_of_one_process(tmp_path):
    run_distributed(on_rank, 1, tmp_path)


@pytest.mark.slow
def test_swapped_update_of_two_ranks_is_that_of_one_process(tmp_path):
    run_distributed(on_rank, 2, tmp_path)


def asked(folder):
    return compose_run([
        "model=v4_tiny", "engine=deepspeed_zero3_nvme", f"engine.nvme_path={folder}",
        "train.device=cpu", "train.precision=fp32",
    ])  # fmt: skip


def test_without_libaio_it_is_refused_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", SimpleNamespace(
        AsyncIOBuilder=lambda: SimpleNamespace(is_compatible=lambda verbose: False)
    ))  # fmt: skip
    monkeypatch.setattr("train.preflight.engine.load_deepspeed", lambda device: None)
    run = asked(tmp_path)
    with pytest.raises(ConfigError, match=r"reads NVMe by libaio, .* say engine.offload_optimizer"):
        check_engine(run, resolve(run), "cpu")
    run = asked(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"engine.nvme_path=.*absent is no folder"):
        check_engine(run, resolve(run), "cpu")


def test_drive_that_is_too_small_is_refused_before_the_start(tmp_path, monkeypatch):
    run = asked(tmp_path)
    world = fit.World(1, "cpu", 1 << 50)
    fit.check(run, resolve(run), world)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(fit.DoesNotFitError, match=r"engine.nvme_path=.* has 0.0 GB free a rank"):
        fit.check(run, resolve(run), world)
