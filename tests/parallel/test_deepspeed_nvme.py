"""NVMe is refused before the start where it cannot work: libaio, the folder, or room lacks."""

import sys
from types import SimpleNamespace

import pytest

from parallel.errors import ConfigError
from train.config.command_line import compose_run
from train.preflight import fit
from train.preflight.engine import check_engine
from train.stages import resolve


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
