"""Writes one checkpoint while training goes on.

    at the step's end   all tensors are copied to host memory; here the run stands still
    every rank's thread writes, fsyncs and hashes the tensors that are its own, then reports
    rank 0's thread     waits for all reports; writes index, state and manifest; publishes

The threads use no collectives, so they cannot come between those of training: a rank reports by a
file in the folder that is being written, and what to write is planned with collectives beforehand,
at the first save. A rank that fails reports nothing; :meth:`Checkpoints.wait` finds out and lets
rank 0 give up.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from parallel.collectives import is_main
from train.checkpoint.files import (
    FORMAT,
    INDEX,
    MANIFEST,
    STATE,
    describe_file,
    fsync,
    seal,
    write_durably,
)

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 0.2  # seconds between two looks for another rank's report


class Snapshot:
    """Copies of a state's tensors in host memory, in buffers that the next save uses again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy this rank's part of every tensor; a DTensor stays one, in the same layout."""
        copies: dict[str, Tensor] = {}
        before, self._buffers = self._buffers, {}  # what a save does not use is let go
        for name, tensor in tensors.items():
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = before.get(name)
            if buffer is None or buffer.shape != own.shape or buffer.dtype != own.dtype:
                buffer = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
            self._buffers[name] = buffer
            buffer.copy_(own, non_blocking=True)
            if isinstance(tensor, DTensor):
                copies[name] = DTensor(buffer, tensor._spec, requires_grad=False)
            else:
                copies[name] = buffer
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
        return copies


@dataclass(frozen=True)
class WrittenFile:
    """What a rank wrote.

    Attributes:
        results: where each of its tensors lies, for the index.
        files: name -> entry of the manifest.
    """

    results: list[WriteResult]
    files: dict[str, dict[str, Any]]


class ShardAssignment:
    """Which rank writes what: planned once, since the tensors of a run keep their shapes.

    Collective.

    Args:
        tensors: of the first save, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.described = describe(tensors)
        self.index: Metadata | None = None  # known to rank 0
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(dict(tensors), None, is_main())
        plans: list[SavePlan | None] = [planner.create_local_plan()]
        if dist.is_initialized():
            mine = plans[0]
            plans = [None] * dist.get_world_size()
            dist.gather_object(mine, plans if is_main() else None, dst=0)
        own: list[SavePlan | None] = [None]
        if is_main():
            planned, self.index = planner.create_global_plan([p for p in plans if p is not None])
            plans = list(dcp.FileSystemWriter(".").prepare_global_plan(planned))
            own = plans[:1]
        if dist.is_initialized():
            dist.scatter_object_list(own, plans if is_main() else None, src=0)
        assert own[0] is not None
        self._plan = own[0]

    def write(self, folder: Path, tensors: Mapping[str, Tensor], rank: int) -> WrittenFile:
        """Write this rank's file, durably, and hash it. Not collective."""
        planner, writer = dcp.DefaultSavePlanner(), self._writer(folder)
        planner.set_up_planner(dict(tensors), writer.storage_meta(), rank == 0)
        planner.create_local_plan()
        results = writer.write_data(planner.finish_plan(self._plan), planner).value()
        files = {path.name: describe_file(path) for path in folder.glob(f"__{rank}_*.distcp")}
        fsync(folder)
        return WrittenFile(results, files)

    def complete(self, folder: Path, reports: list[WrittenFile], state: Mapping[str, Any]) -> None:
        """Write index, state and manifest. Rank 0's part, not collective."""
        assert self.index is not None
        self._writer(folder).finish(self.index, [report.results for report in reports])
        write_durably(folder / STATE, json.dumps(state, indent=1, allow_nan=False))
        files = {name: entry for report in reports for name, entry in report.files.items()}
        files |= {name: describe_file(folder / name) for name in (INDEX, STATE)}
        manifest = {"format": FORMAT, "step": state["step"], "files": files}
        write_durably(folder / MANIFEST, seal(manifest))
        fsync(folder)

    def _writer(self, folder: Path) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(folder, sync_files=True, overwrite=False, thread_count=1)


def describe(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """What a layout depends on."""
    return {
        name: (t.shape, t.dtype, t.placements if isinstance(t, DTensor) else None)
        for name, t in tensors.items()
    }


class GivenUpError(Exception):
    """Another rank failed, so this save cannot become complete."""


class RunningSave:
    """One save on this rank, in a thread of its own.

    Args:
        step: that is saved.
        write: writes this rank's part and returns its report.
        publish: on rank 0: takes the reports of all ranks, in order; None on the others.
        afterwards: what rank 0 does when it is published; it does not raise.
        folder: in which the checkpoint is written.

    Attributes:
        published: the checkpoint is complete and has its name (known on rank 0).
        error: what went wrong on this rank, in one line.
        give_up: set it to stop waiting for other ranks.
    """

    def __init__(
        self,
        step: int,
        write: Callable[[], WrittenFile],
        publish: Callable[[list[WrittenFile]], None] | None,
        afterwards: Callable[[], None],
        folder: Path,
    ) -> None:
        self.step, self.folder = step, folder
        self.published, self.error, self._seconds = False, "", 0.0
        self.give_up = threading.Event()
        self._write, self._publish, self._afterwards = write, publish, afterwards
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether this rank still works on it."""
        return self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for this rank's part, for at most so long."""
        self._thread.join(seconds)

    def tell_seconds(self) -> float:
        """What it took, once: 0 while it runs and when it was told before."""
        if self.running:
            return 0.0
        told, self._seconds = self._seconds, 0.0
        return told

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            own = self._write()
            if self._publish is None:
                leave_report(self.folder, own)
            else:
                self._publish([own, *self._reports_of_others()])
                self.published = True
        except GivenUpError:
            pass
        except Exception as error:  # whatever it is, it costs this checkpoint and not the run
            self.error = f"{type(error).__name__}: {error}".splitlines()[0]
            log.error("checkpoint of step %d failed: %s", self.step, _where() + self.error)
            log.debug("checkpoint of step %d failed", self.step, exc_info=True)
        finally:
            if self._publish is not None and not self.published:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._seconds = time.perf_counter() - began
        if self.published:
            self._afterwards()

    def _reports_of_others(self) -> list[WrittenFile]:
        world = dist.get_world_size() if dist.is_initialized() else 1
        return [self._await_report(rank) for rank in range(1, world)]

    def _await_report(self, rank: int) -> WrittenFile:
        path, pause = report_path(self.folder, rank), 0.001
        while not path.exists():
            if self.give_up.wait(pause):
                raise GivenUpError
            pause = min(2 * pause, _LONGEST_PAUSE)
        report = pickle.loads(path.read_bytes())
        path.unlink()
        return report


def report_path(folder: Path, rank: int) -> Path:
    """File by which a rank reports. It lives while the save runs, under a name nobody can guess."""
    return folder / f"report_{rank}"


def leave_report(folder: Path, report: WrittenFile) -> None:
    """Tell rank 0 that this rank's file is durable; the report appears whole or not at all."""
    final = report_path(folder, dist.get_rank())
    aside = final.with_suffix(".partial")
    aside.write_bytes(pickle.dumps(report))
    aside.rename(final)


def _where() -> str:
    return f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
