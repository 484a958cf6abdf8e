"""NVMe: refused before the start where it cannot work, and run where libaio is.

What runs it is slow and needs libaio with its headers, which no package of Python brings (Debian:
libaio-dev): DeepSpeed compiles its reader for 2 to 6 minutes, once a machine. Bounds are those of
test_deepspeed.py. The vocabulary is large enough that AdamW's groups reach the drive too: DeepSpeed
keeps groups below 1 MiB in host memory.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.errors import DiskError
from optim.groups import Owner
from parallel import zero_drive
from parallel.config import EngineConfig, EngineName, OffloadTo
from parallel.errors import ConfigError
from parallel.zero_drive import CheckedHandle, SwapFolder, remove_abandoned
from tests.helpers import random_rows, run_distributed, tiny_config
from tests.integration.small_run import (
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from tests.integration.test_full_disk import fill, small_disk
from tests.parallel.ranks import SEQ_LEN, alone
from tests.parallel.test_deepspeed import ROWS, compare_engines, compare_step, zero
from tests.parallel.test_deepspeed_run import fit_until
from train.build import build
from train.config.command_line import compose_run
from train.errors import FAILURES, ExitCode
from train.preflight import fit as preflight
from train.preflight.engine import check_engine
from train.preflight.resting import Values, rest_of_zero
from train.stages import resolve

VOCAB = 4096
LIBAIO = Path("/usr/include/libaio.h")
needs_libaio = pytest.mark.skipif(not LIBAIO.exists(), reason="needs libaio (libaio-dev)")


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
    world = preflight.World(1, "cpu", 1 << 50)
    preflight.check(run, resolve(run), world)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        preflight.DoesNotFitError, match=r"engine.nvme_path=.* has 0.0 GB free a rank"
    ):
        preflight.check(run, resolve(run), world)


# ---- what DeepSpeed's reader lacks, on a reader that does nothing but keep bytes -----------------
class Reader:
    """As DeepSpeed's: says that all is well, and moves nothing to or from the middle of a block."""

    def __init__(self):
        self.pending, self.borrowed = [], []

    def new_cpu_locked_tensor(self, numel, like):
        room = torch.zeros(numel + 1024, dtype=like.dtype)
        self.borrowed.append(room)
        start = -room.data_ptr() % 4096 // room.element_size()
        return room[start : start + numel]

    def free_cpu_locked_tensor(self, buffer):
        self.borrowed.pop()

    def async_pwrite(self, buffer, path, offset):
        if buffer.data_ptr() % 512:
            buffer = torch.zeros_like(buffer)
        Path(path).write_bytes(buffer.numpy().tobytes())
        self.pending.append(path)
        return 0

    def async_pread(self, buffer, path, offset):
        bytes_ = bytearray(Path(path).read_bytes()[: buffer.nbytes])
        if buffer.data_ptr() % 512 == 0:
            buffer.copy_(torch.frombuffer(bytes_, dtype=buffer.dtype))
        self.pending.append(path)
        return 0

    def wait(self):
        done, self.pending = len(self.pending), []
        assert done  # its own would abort
        return done


@pytest.fixture
def handle():
    return CheckedHandle(Reader(), {}, "/drive")


def test_what_is_read_back_is_what_was_written(tmp_path, handle):
    path = str(tmp_path / "a.swp")
    for start in (0, 3):  # 12 bytes into a block
        data, back = torch.randn(515)[start:], torch.zeros(515)[start:]
        assert handle.async_pwrite(data, path, 0) == 0
        assert handle.wait() == 1
        assert handle.async_pread(back, path, 0) == 0
        assert handle.wait() == 1
        assert torch.equal(data, back)
        assert handle._handle.borrowed == []


def test_bytes_that_changed_on_the_drive_are_named(tmp_path, handle):
    path = tmp_path / "a.swp"
    handle.async_pwrite(torch.randn(512), str(path), 0)
    handle.wait()
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(512))  # a block that a failing drive lost
    handle.async_pread(torch.empty(512), str(path), 0)
    with pytest.raises(DiskError, match=r"engine.nvme_path=/drive gives back another a.swp"):
        handle.wait()


def test_file_that_is_gone_is_named_and_nothing_stays_pending(tmp_path, handle):
    handle.async_pwrite(torch.randn(512), str(tmp_path / "a.swp"), 0)
    with pytest.raises(DiskError, match=r"engine.nvme_path=/drive has lost b.swp"):
        handle.async_pread(torch.empty(512), str(tmp_path / "b.swp"), 0)
    assert handle._handle.pending == []  # its destructor aborts the process otherwise


def test_full_drive_is_named_before_anything_is_written(tmp_path, handle):
    drive = tmp_path / "drive"
    drive.mkdir()
    with small_disk(drive, 1 << 16):
        handle.async_pwrite(torch.randn(4096), str(drive / "a.swp"), 0)
        with pytest.raises(DiskError, match=r"cannot hold b.swp \(65,536 bytes\): No space left"):
            handle.async_pwrite(torch.randn(1 << 14), str(drive / "b.swp"), 0)
        assert handle._handle.pending == []
        handle.async_pwrite(torch.randn(4096), str(drive / "a.swp"), 0)  # room that it has


def test_each_process_has_a_folder_of_its_own_that_goes_with_it(tmp_path):
    one, two = SwapFolder(str(tmp_path)), SwapFolder(str(tmp_path))
    assert one.path != two.path
    killed = tmp_path / f"{zero_drive._PREFIX}killed"
    killed.mkdir()
    (killed / zero_drive._LOCK).touch()
    (tmp_path / "theirs").mkdir()
    foreign = tmp_path / "v4_swap_another-host_killed"  # whose locks may not be seen here
    foreign.mkdir()
    (foreign / "lock").touch()
    remove_abandoned(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {
        "theirs", foreign.name, Path(one.path).name, Path(two.path).name,
    }  # fmt: skip
    del one
    two.remove()
    assert {p.name for p in tmp_path.iterdir()} == {"theirs", foreign.name}


# ---- with libaio -------------------------------------------------------------------------------
def on_nvme(folder, parameters=OffloadTo.cpu):
    folder.mkdir(exist_ok=True)
    return EngineConfig(
        EngineName.deepspeed, 3, OffloadTo.nvme, parameters, nvme_path=str(folder)
    )  # fmt: skip


def compares(rank, world, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    for parameters in OffloadTo:
        reference = alone("tiny", vocab_size=VOCAB)
        engine = zero(
            3, OffloadTo.nvme, "tiny", engine=on_nvme(folder, parameters), vocab_size=VOCAB
        )
        assert engine.partitions.on_drive() * 4 * world > 0.99 * sum(
            p.numel() * 4 for p in reference.model.parameters()
        )
        rows = random_rows(ROWS, 4 * SEQ_LEN, VOCAB)
        compare_step(engine, reference, rows, 2)
        compare_engines(engine, reference, rows, 2)
        takes_what_was_foretold(engine, parameters, world)


def takes_what_was_foretold(engine, parameters, world):
    sizes = {owner: 0 for owner in Owner}
    for record in engine.optimizer.table:
        sizes[record.owner] += math.prod(record.shape)
    rest = rest_of_zero(
        "nvme", parameters.value, Values(sizes[Owner.muon], sizes[Owner.adamw], 0), world
    )
    size = sum(path.stat().st_size for path in Path(engine._swap.path).rglob("*.swp"))
    # Gradients and weights of less than 1 MiB a rank stay in host memory.
    assert rest.disk / 3 < size <= 1.02 * rest.disk, (size, rest)
    buffers = engine._zero_engine.optimizer.optimizer_swapper.swap_buffer_manager.all_buffers
    assert sum(buffer.nbytes for buffer in buffers) < rest.host


@needs_libaio
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_zero_3_on_nvme_trains_as_one_process(tmp_path, world):
    run_distributed(compares, world, tmp_path / "drive")


def tiny_run(folder, corpus, engine, **train):
    run = small_run(folder, corpus, steps=4, eval_every=0, checkpoint_every=2, **train)
    return replace(run, model=tiny_config(vocab_size=VOCAB), engine=engine)


def runs(rank, world, folder, corpus):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    drive = folder / "drive"
    on_host = EngineConfig(EngineName.deepspeed, 3, OffloadTo.cpu, OffloadTo.cpu)
    straight = tiny_run(folder / "host", corpus, on_host)
    killed = tiny_run(folder / "killed", corpus, on_nvme(drive))
    assert fit(straight)[0] == ExitCode.finished
    fit_until(killed, 3)
    assert fit(killed)[0] == ExitCode.finished
    assert metrics_of(killed) == metrics_of(straight)
    assert differing(final_tensors(killed), final_tensors(straight)) == []


@needs_libaio
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_run_on_nvme_is_killed_and_goes_on_as_one_on_the_host(tmp_path, world):
    run_distributed(runs, world, tmp_path, write_corpus(tmp_path))


def fills(rank, world, folder, corpus):
    """The drive has room for masters and moments, and none for gradients."""
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    drive = folder / "drive"
    run = tiny_run(folder / "run", corpus, on_nvme(drive))
    straight = tiny_run(folder / "straight", corpus, on_nvme(drive))
    assert fit(straight)[0] == ExitCode.finished
    fit_until(run, 3)
    trainer = build(run)
    fill(drive)
    with pytest.raises(FAILURES, match=r"cannot hold .*gradient.*: No space left on device"):
        trainer.fit()
    (drive / "filler").unlink()
    del trainer
    assert fit(run)[0] == ExitCode.finished
    assert metrics_of(run) == metrics_of(straight)
    assert differing(final_tensors(run), final_tensors(straight)) == []


@needs_libaio
@pytest.mark.slow
def test_drive_that_is_full_in_mid_run_costs_one_line_and_no_data(tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    with small_disk(drive, 1 << 26):
        run_distributed(fills, 1, tmp_path, write_corpus(tmp_path))


def refused(rank, world, folder):
    os.environ["LOCAL_RANK"] = str(rank)
    with pytest.raises(ConfigError, match=r"offload_optimizer=nvme, but DeepSpeed keeps groups"):
        zero(3, OffloadTo.nvme, engine=on_nvme(folder))


@needs_libaio
@pytest.mark.slow
def test_model_of_which_nothing_would_reach_the_drive_is_refused(tmp_path):
    run_distributed(refused, 1, tmp_path / "drive")
