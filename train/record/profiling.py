"""Profiler windows on request: a Chrome trace and a table of the costliest ops."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE = "profile"  # folder of a run's folder
log = logging.getLogger(__name__)


class ProfilerWindow:
    """Profiles ``steps`` steps from step ``start`` on and writes ``profile/`` in the run folder.

    Args:
        folder: run folder.
        start: number of the first profiled step.
        steps: how many; 0 = none.
        device: where the run computes.
        rank: of this process; every rank writes files of its own.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, device: torch.device, rank: int = 0
    ) -> None:
        self._folder, self._first, self._last = folder / PROFILE, start, start + steps - 1
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._suffix = f"_rank{rank}" if rank else ""
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Call before step number ``step``."""
        if self._first <= step <= self._last and self._profiler is None:
            self._profiler = profile(activities=self._activities)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Call after step number ``step``."""
        if self._profiler is None or step < self._last:
            return
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps_{self._first}_{self._last}{self._suffix}"
        self._profiler.export_chrome_trace(str(self._folder / f"{name}.json"))
        table = self._profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
        (self._folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        log.info("profile of steps %d to %d: %s", self._first, self._last, self._folder)
        self._profiler = None
