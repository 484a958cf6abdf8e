"""One rank of a start: a fork of the warm parent that runs the command, and dies as told."""

from __future__ import annotations

import copy
import faulthandler
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import scripts.export_hf
import train.build
import train.loop
from parallel import lost_rank
from parallel.collectives import local
from tests.endurance import disk, life
from train import pretrain
from train.checkpoint.manager import Checkpoints
from train.config.command_line import CONF
from train.recovery.stop import leave_on_signal
from train.run_folder import lock as folder_lock

DAY = 86400.0


@dataclass(frozen=True)
class Order:
    """What a process is to do.

    Attributes:
        words: the command line.
        folder: the run's.
        event: what happens to this process.
        pinned: checkpoint that cannot be removed.
        days_back: how far its clock is set back.
        faults: put back into the code; each is called.
    """

    words: Sequence[str]
    folder: Path
    event: life.Event
    pinned: Path | None = None
    days_back: int = 0
    faults: Sequence[Callable[[], None]] = ()


class Composed:
    """Hydra's work, done once: most of a start is the same words again, and takes 0.7 s to read.

    Args:
        words: of every start.
    """

    def __init__(self, words: Sequence[str]) -> None:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            config = hydra.compose("config", list(words), return_hydra_config=True)
        HydraConfig.instance().set_config(config)  # as hydra.main does
        with open_dict(config):
            del config["hydra"]
        self._config = config

    def stand_in(self, words: Sequence[str]) -> None:
        """Let ``pretrain.cli`` of this process take its config from here."""
        config = copy.deepcopy(self._config)
        config.merge_with_dotlist(list(words))

        def main(**_: Any) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
            return lambda job: lambda: job(config)

        pretrain.hydra.main = main
        pretrain.in_own_folder = lambda config, _: config


def train_rank(order: Order, composed: Composed, rank: int, note: Callable[[str], None]) -> int:
    """Run the command as this rank; its exit code."""
    prepare()
    level = logging.WARNING if rank else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", force=True)
    shorten_waits()
    composed.stand_in(order.words)
    now = time.time
    time.time = lambda: now() - order.days_back * DAY
    for fault in order.faults:
        fault()
    if order.event.name == life.NAN and order.event.rank == rank:
        spoil_weights(order.event, note)
    watch_memory(note)
    tell_when_joined(note)
    everywhere = order.event.name == life.LOCKED
    event = order.event if everywhere or order.event.rank == rank else life.Event()
    files = disk.Disk(order.folder, event, order.pinned, note)
    files.install()
    try:
        return pretrain.cli(order.words)
    finally:
        note(f"calls {json.dumps(files.calls)}")


def export(source: Path, target: Path, pause_at: int, note: Callable[[str], None]) -> int:
    """Export a run, stopping for a while at the n-th file of it that is opened."""
    prepare()
    opened, found = [0], scripts.export_hf.open_source

    def count(name: str, args: tuple[Any, ...]) -> None:
        if name == "open" and str(args[0]).startswith(f"{source}/checkpoints/"):
            opened[0] += 1
            if opened[0] == pause_at:
                note("struck open")
                os.kill(os.getpid(), signal.SIGSTOP)

    def noted(path: Path, *weights: Any) -> Any:
        model = found(path, *weights)
        note(f"source {model.path.name}")  # pyright: ignore[reportAttributeAccessIssue]
        return model

    sys.addaudithook(count)
    scripts.export_hf.open_source = noted
    words = [str(source), str(target), "--to", "official", "--dtype", "fp32"]
    return scripts.export_hf.main(words)


def prepare() -> None:
    """What a new process would have."""
    sys.argv = ["pretrain.py"]
    faulthandler.register(signal.SIGUSR1)  # the parent asks where it hangs
    leave_on_signal()


def shorten_waits() -> None:
    """What waits for people, launchers and other hosts need not do so here."""
    pretrain.PATIENCE, lost_rank._PATIENCE = 5.0, 0.0
    folder_lock._PATIENCE, folder_lock._SETTLE = 0.5, 0.05


def spoil_weights(event: life.Event, note: Callable[[str], None]) -> None:
    """Let one number of one weight become NaN after a step."""
    train_step = train.loop.train_step

    def spoiling(engine: Any, rows: Any, step: Any, *args: Any) -> Any:
        result = train_step(engine, rows, step, *args)
        if step.number == event.call:
            parameters = [local(p.detach()) for p in engine.model.parameters()]
            parameters = [p for p in parameters if p.numel()]
            spoilt = parameters[event.which % len(parameters)]
            place = torch.unravel_index(torch.tensor(event.which % spoilt.numel()), spoilt.shape)
            spoilt[place] = torch.nan
            note("struck step")
        return result

    train.loop.train_step = spoiling


def tell_when_joined(note: Callable[[str], None]) -> None:
    """Tell when the ranks have found each other."""
    build_layout = train.build.build_layout

    def telling(run: Any) -> Any:
        mesh = build_layout(run)
        note("joined")
        return mesh

    train.build.build_layout = telling


def watch_memory(note: Callable[[str], None]) -> None:
    """Tell if the copies that saves keep in memory are more than the largest save had."""
    start = Checkpoints.start
    largest = [0]

    def watching(self: Checkpoints, step: int, tensors: Mapping[str, Any], *args: Any, **more: Any):
        size = sum(local(tensor).nbytes for tensor in tensors.values())
        largest[0] = max(largest[0], size)
        start(self, step, tensors, *args, **more)
        held = held_bytes(self._snapshot)
        if held > largest[0]:
            note(f"broken {held} bytes are kept for saves, the largest had {largest[0]}")

    Checkpoints.start = watching


def held_bytes(value: Any, depth: int = 4) -> int:
    """Bytes of all tensors that an object of the checkpoint code holds."""
    if isinstance(value, torch.Tensor):
        return local(value).nbytes
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif type(value).__module__.startswith("train.checkpoint"):
        inside = vars(value).values()
    return sum(held_bytes(one, depth - 1) for one in inside) if depth else 0


def leave(body: Callable[[], int]) -> None:
    """Run ``body`` and end this process with its code, as an interpreter would."""
    code = 1
    try:
        code = body()
    except SystemExit as left:
        code = int(left.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
