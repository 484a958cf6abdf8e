"""Measure what a rank's step takes in memory when rows are cut into shards (``parallel.cp``).

    python scripts/bench.py context --tokens 32768 131072 --cp 1 2 4
    python scripts/bench.py context --model v4_nano --tokens 131072 --activation_checkpoint block

One row of each length, gloo processes of this machine, one training step in fp32: forward,
backward, update. A process counts the tensors that the step makes and that are alive at once
(``scripts/benchmarks/live_bytes.py``); weights and gradients were there before. Of that the entries
and indexer keys of all shards, which every rank holds, are known in closed form
(``model/activation_memory.py``); the rest should fall as 1 / cp. Beside it stands the peak of
resident memory above what it was before: with what heaps keep, and what operators use inside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from data.batch import IGNORE, Batch
from model.activation_memory import MODES, gathered_entry_bytes
from model.config import ModelConfig
from model.loss import Objective
from optim.build import build_optimizer
from optim.config import OptimConfig
from parallel.config import ParallelConfig
from parallel.distributed import DistributedEngine
from parallel.mesh import build_mesh, check_layout
from parallel.sharded_model import build_sharded_model
from scripts.benchmarks.child import memory_bytes
from scripts.benchmarks.live_bytes import LiveBytes
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole
from train.errors import UserError

CPU = torch.device("cpu")
WITHIN = 0.15  # of the memory of one process over cp


def row_of(tokens: int, document: int, config: ModelConfig) -> Batch:
    """One row of random documents of equal length."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.vocab_size, (1, tokens), generator=generator)
    documents_BT = (torch.arange(tokens) // document)[None]
    depths = 1 + config.num_nextn_predict_layers
    labels_BTK = torch.full((1, tokens, depths), IGNORE)
    for k in range(depths):
        same = documents_BT[0, 1 + k :] == documents_BT[0, : -1 - k]
        labels_BTK[0, : -1 - k, k] = torch.where(same, ids_BT[0, 1 + k :], IGNORE)
    return Batch(ids_BT, documents_BT, labels_BTK)


def on_rank(rank: int, cp: int, tokens: int, args: argparse.Namespace, folder: str) -> None:
    """One process; writes what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=cp)
    config = load_model_config(args.model)
    layout = ParallelConfig(dp_shard=1, cp=cp).resolve(cp)
    check_layout(layout, config)
    mesh = build_mesh(layout, "cpu")
    model = build_sharded_model(
        config, mesh, CPU, activation_checkpoint=args.activation_checkpoint, seq_len=tokens
    )
    optimizer = build_optimizer(
        model.named_parameters(), OptimConfig(), split_counts=config.split_counts,
        group=mesh.data.get_group(),
    )  # fmt: skip
    engine = DistributedEngine(model, optimizer, CPU, 1.0, mesh)

    def step(length: int) -> float:
        depths = 1 + config.num_nextn_predict_layers
        objective = Objective((float(length),) * depths, float(length))
        rows = [row_of(length, args.document, config)]
        total = engine.forward_backward(rows, objective).total
        assert total is not None
        return float(total)

    step(64 * cp)  # gradients and libraries are there from now on
    for parameter in optimizer.trainable_parameters().values():
        if parameter.grad is not None:
            parameter.grad.zero_()
    before, began = memory_bytes(CPU, "VmRSS"), time.perf_counter()
    with LiveBytes() as live:
        loss = step(tokens)
        update = engine.optimizer_step(1e-3, math.isfinite(loss))
    took = {
        "loss": loss,
        "grad_norm": update.grad_norm,
        "applied": update.applied,
        "bytes": live.most,
        "resident": memory_bytes(CPU, "VmHWM") - before,
        "seconds": time.perf_counter() - began,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(took, allow_nan=False))
    dist.destroy_process_group()


def measure(cp: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """The fullest of ``cp`` processes that share a row of ``tokens``."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # of the processes that start now
        mp.spawn(on_rank, (cp, tokens, args, folder), nprocs=cp)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(cp)]
    if not all(one["applied"] for one in found):
        raise RuntimeError(f"the update was not applied: {found}")
    config, mode = load_model_config(args.model), args.activation_checkpoint
    entries = entry_bytes(config, tokens, mode) if cp > 1 else 0.0
    most = max(one["bytes"] for one in found)
    return {
        "tokens": tokens, "cp": cp, "bytes": most, "entry_bytes": round(entries),
        "rest": most - round(entries),
        "resident": max(one["resident"] for one in found),
        "seconds": max(one["seconds"] for one in found), "loss": found[0]["loss"],
        "grad_norm": found[0]["grad_norm"],
    }  # fmt: skip


def entry_bytes(config: ModelConfig, tokens: int, mode: str) -> float:
    """Entries and keys of the whole row that a rank holds at its peak, fp32."""
    layers = [
        tokens * gathered_entry_bytes(config, config.kind(i), config.ratio(i), 4)
        for i in range(config.num_hidden_layers)
    ]
    return max(layers) if mode == "block" else sum(layers)


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a rank's share is not a share."""
    args = options().parse_args(words)
    if args.json:
        check_output("--json", Path(args.json), '"entry_bytes"')
    for tokens, cp in product(args.tokens, args.cp):
        if tokens % cp:
            raise UserError(f"--tokens {tokens} must be a multiple of --cp {cp}")
    print(f"{args.model}, one row, documents of {args.document:,} tokens, fp32,"
          f" train.activation_checkpoint={args.activation_checkpoint}")  # fmt: skip
    print(f"{'tokens':>9} {'cp':>3} {'MB a rank':>10} {'entries':>8} {'rest':>8} {'of 1/cp':>8}"
          f" {'resident':>9} {'seconds':>8} {'loss':>12}")  # fmt: skip
    found: list[dict[str, Any]] = []
    for tokens, cp in product(args.tokens, args.cp):
        one = measure(cp, tokens, args)
        first = next((other for other in found if other["tokens"] == tokens), one)
        one["share"] = one["rest"] * cp / (first["rest"] * first["cp"])
        found.append(one)
        print(f"{tokens:9,} {cp:3} {one['bytes'] / 1e6:10,.0f} {one['entry_bytes'] / 1e6:8,.0f}"
              f" {one['rest'] / 1e6:8,.0f} {one['share']:8.2f} {one['resident'] / 1e6:9,.0f}"
              f" {one['seconds']:8.1f} {one['loss']:12.7f}",
              flush=True)  # fmt: skip
        if args.json:
            asked = {key: value for key, value in vars(args).items() if key != "json"}
            write_json(
                Path(args.json), {"asked": asked, "torch": torch.__version__, "found": found}
            )
    return int(any(abs(one["share"] - 1) > WITHIN for one in found))


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="v4_tiny", help="of conf/model")
    parser.add_argument(
        "--tokens", type=whole(least=1), nargs="+", default=[32768], help="of the row"
    )
    parser.add_argument(
        "--document", type=whole(least=1), default=4096, help="tokens of a document"
    )
    parser.add_argument("--cp", type=whole(least=1), nargs="+", default=[1, 2, 4], help="shards")
    parser.add_argument("--activation_checkpoint", default="none", choices=MODES)
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    return parser
