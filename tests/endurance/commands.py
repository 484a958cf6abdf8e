"""The command of a life, on one rank or several, started from a warm parent."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from scripts.layout_trials.asked import free_port
from tests.endurance import child, life
from tests.endurance.processes import Job, Process
from train import pretrain

SEQ_LEN, ROWS = 32, 2
_MODEL = (  # both compressed kinds, a hash router, a learned one; the MTP block attends by window
    "model=v4_tiny", "model.num_hidden_layers=2", "model.compress_ratios=[4,8,0]",
    "model.layer_kinds=[csa,hca]", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.head_dim=16", "model.q_lora_rank=16", "model.o_lora_rank=16", "model.index_topk=4",
    "model.index_head_dim=16", "model.n_routed_experts=4", "model.moe_intermediate_size=16",
    "model.sliding_window=8",
)  # fmt: skip
_TRAIN = (
    f"train.seq_len={SEQ_LEN}", f"train.global_batch_tokens={ROWS * SEQ_LEN}", "train.device=cpu",
    f"train.eval_tokens={2 * SEQ_LEN}", "train.monitor_every=4", "train.log_samples=true",
    "optim.muon.dtype=fp32", "sample.tokens=2", "optim.schedule.warmup_steps=1",
    # A horizon that is not the run's length, so that a longer run begins as a shorter one.
    f"train.stages=[{{name:all,until_tokens:{20 * ROWS * SEQ_LEN}}}]",
)  # fmt: skip


@dataclass(frozen=True)
class Commands:
    """What all starts of all lives share.

    Attributes:
        words: of the command line.
        composed: they, read by Hydra.
        faults: put back into the code of every start but the undisturbed ones.
    """

    words: Sequence[str]
    composed: child.Composed
    faults: Sequence[Callable[[], None]] = ()

    def start(
        self,
        variant: str,
        start: life.Start,
        folder: Path,
        log: Path,
        pinned: Path | None = None,
        days_back: int = 0,
        more: Sequence[str] = (),
        sound: bool = False,
    ) -> Job:
        """Start the command.

        Args:
            variant: of the life.
            start: layout, options and event.
            folder: of the run.
            log: of rank 0; the others' lie beside it.
            pinned: see :class:`child.Order`.
            days_back: see :class:`child.Order`.
            more: words.
            sound: without the faults.
        """
        ranks = life.LAYOUTS[start.layout][0]
        words = [*life.VARIANTS[variant], *start.words(), *more, f"run_dir={folder}"]
        faults = () if sound else self.faults
        order = child.Order(words, folder, start.during, pinned, days_back, faults)
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
        if ranks > 1:
            world["MASTER_PORT"] = str(free_port())
        processes = []
        for rank in range(ranks):
            mine = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            body = partial(_train, order, self.composed, rank)
            path = log if rank == 0 else log.with_name(f"{log.stem}_rank{rank}.log")
            processes.append(Process(body, path, mine))
        return Job(processes)


def _train(
    order: child.Order, composed: child.Composed, rank: int, note: Callable[[str], None]
) -> int:
    return child.train_rank(order, composed, rank, note)


def prepare(place: Path, faults: Sequence[Callable[[], None]] = ()) -> Commands:
    """Make the text, and import and run in this process all that a start does.

    Args:
        place: folder for what lives share.
        faults: put back into the code.
    """
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or it keeps a thread
    place.mkdir(parents=True, exist_ok=True)
    words = (
        *_MODEL, *_TRAIN, "data=jsonl", f"data.sources.jsonl.path={_write_text(place)}",
        f"data.cache_dir={place / 'cache'}", "data.tokenizer=byte", "data.validation.bytes=600",
        "data.validation.max_overlap=1", "train.precision=fp32",
    )  # fmt: skip
    folder = place / f"warm_{os.getpid()}"
    sys.argv = ["pretrain.py"]

    def run() -> int:
        shutil.rmtree(folder, ignore_errors=True)
        return pretrain.cli([*words, *life.Start(steps=4, every=1).words(), f"run_dir={folder}"])

    # The first run also prepares the text, by threads that would stay: so it gets a process.
    first = Process(lambda _: run(), place / "warm.log")
    Job([first]).wait()
    assert first.code == 0, first.printed()
    assert run() == 0, "the run that warms the parent failed"
    shutil.rmtree(folder)
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join(60)  # one that draws the next pool
    assert threading.active_count() == 1, threading.enumerate()
    assert len(os.listdir("/proc/self/task")) == 1, "a process of several threads cannot be forked"
    composed = child.Composed(words)
    gc.freeze()  # or the first collection of each fork copies all of the parent's memory
    return Commands(words, composed, faults)


def _write_text(place: Path) -> Path:
    path = place / "text.jsonl"
    if path.exists():
        return path
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(60)]
    lines = [" ".join(rng.choices(vocabulary, k=rng.choice((5, 10, 30)))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
