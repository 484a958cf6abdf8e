"""What a trial of a layout is asked: degrees, the run that they make, its text, its processes."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from parallel.config import SCHEDULES
from parallel.mesh import check_layout
from scripts.cli.parser import whole
from train.config.command_line import CONF, compose_run
from train.config.schema import RunConfig
from train.errors import UserError
from train.stages import check_contexts, check_rows, check_schedule, resolve

_DEGREES = ("dp_replicate", "dp_shard", "ep", "pp", "cp")
_OFFLOADS = ("parallel.offload", "parallel.offload_activations")


@dataclass(frozen=True)
class TrialLayout:
    """What was asked for: ``parallel`` keys, rows of a microbatch (0: default), the engine.

    ``more`` has keys of the engine and of offload, as one types them.
    """

    text: str
    keys: dict[str, str]
    micro: int
    engine: str = "torch"
    more: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes it takes."""
        degrees = {key: int(self.keys.get(key, "1")) for key in _DEGREES}
        return degrees["pp"] * degrees["dp_replicate"] * degrees["dp_shard"] * degrees["cp"]


def parse(text: str) -> TrialLayout:
    """Read ``"dp_shard=4 ep=2 micro=1"``.

    Raises:
        ValueError: a word that is no degree, schedule or microbatch.
    """
    keys, micro, engine, more = {"dp_shard": "1"}, 0, "torch", []
    for word in text.split():
        key, _, value = word.partition("=")
        if key == "schedule" and value in SCHEDULES:
            keys[key] = value
        elif key in _DEGREES and value.isdigit() and int(value):
            keys[key] = value
        elif key == "engine" and value in engines():
            engine = value
        elif key == "micro" and value.isdigit() and int(value):
            micro = int(value)
        elif value and (key.startswith("engine.") or key in _OFFLOADS):
            more.append(word)
        else:
            raise UserError(
                f"layout {text!r}: {word!r} is none of {'=N, '.join((*_DEGREES, 'micro'))}=N,"
                f" schedule={'|'.join(SCHEDULES)}, engine={'|'.join(engines())}, engine.KEY=,"
                f" {'=, '.join(_OFFLOADS)}="
            )
    return TrialLayout(text, keys, micro, engine, tuple(more))


def engines() -> list[str]:
    """Options of ``conf/engine``."""
    return sorted(path.stem for path in (CONF / "engine").glob("*.yaml"))


def compose(layout: TrialLayout, args: argparse.Namespace, corpus: str, *more: str) -> RunConfig:
    """The run of a layout.

    Raises:
        ValueError: it cannot be; names the keys.
    """
    rows = args.rows // (int(layout.keys["dp_shard"]) * int(layout.keys.get("dp_replicate", "1")))
    micro = layout.micro or max(
        1, rows // (2 * int(layout.keys.get("pp", "1")) if "pp" in layout.keys else 1)
    )
    run = compose_run(
        [
            f"model={args.model}", "data=jsonl", f"data.sources.jsonl.path={corpus}/text.jsonl",
            f"data.cache_dir={corpus}/cache", "data.tokenizer=byte", "data.validation.bytes=0",
            f"train.steps={args.steps}", f"train.seq_len={args.seq_len}", "train.monitor_every=0",
            f"train.global_batch_tokens={args.rows * args.seq_len}", "train.precision=fp32",
            f"train.micro_batch_size={micro}", f"train.device={args.device}",
            f"engine={layout.engine}",
            "optim.muon.dtype=fp32", f"run_dir={corpus}/run", *args.set,
            *(f"parallel.{key}={value}" for key, value in layout.keys.items()), *layout.more, *more,
        ]
    )  # fmt: skip
    resolved = run.parallel.resolve(layout.ranks)
    check_layout(resolved, run.model)
    check_contexts(resolve(run), run, resolved)
    check_rows(resolve(run), resolved.data_degree)
    check_schedule(resolve(run), resolved)
    return run


def write_corpus(folder: str) -> None:
    """Documents of 5 to 400 words over a small alphabet, the same everywhere."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(80)]
    with Path(folder, "text.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(200):
            text = " ".join(rng.choices(vocabulary, k=rng.choice((5, 20, 60, 400))))
            file.write(json.dumps({"text": text}, allow_nan=False) + "\n")


def join(rank: int, port: int, ranks: int) -> None:
    """Make this process one of ``ranks`` on this machine, as torchrun would."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)


def warm_context() -> ForkServerContext:
    """Starts processes as forks of one that has a run's imports: each would take seconds for them.

    That one has touched no device and started no thread.
    """
    multiprocessing.set_forkserver_preload(["train.build"])
    return multiprocessing.get_context("forkserver")


def start_ranks(on_rank: Callable[..., None], args: tuple[Any, ...], ranks: int) -> None:
    """Run ``on_rank(rank, *args)`` in a process for each rank, to their end.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what a rank raised, with its traceback.
        torch.multiprocessing.ProcessExitedException: a rank was ended from outside.
    """
    context = warm_context()
    mp.start_processes(on_rank, args, nprocs=ranks, start_method=context.get_start_method())


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def add_run_options(parser: argparse.ArgumentParser, layouts: Sequence[str], steps: int) -> None:
    """Options that say what is run; ``scripts/layout_trials/step_parts.py`` has them too."""
    parser.add_argument("layouts", nargs="*", default=layouts, help="degrees of each layout")
    parser.add_argument("--model", default="v4_tiny", help="of conf/model")
    parser.add_argument("--steps", type=whole(least=1), default=steps)
    parser.add_argument("--rows", type=whole(least=1), default=8, help="of a global batch")
    parser.add_argument("--seq-len", type=whole(least=1), default=64, help="tokens of a row")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other config")
