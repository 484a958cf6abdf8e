"""How long a run stands still for a checkpoint: behind the steps, and in front of them.

    python scripts/bench.py checkpoint                          # v4_nano
    python scripts/bench.py checkpoint --model v4_tiny --saves 20 --out bench.json

One process trains the model on random tokens and saves after every few steps, in turns behind the
steps and in front of them, so that both see the same machine. Columns: seconds the run stood still
(median, first and third quartile over the saves), the same for what went on behind the steps, and
the ratio of the medians. The first save of each kind plans and allocates, and is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch
from model.init import init_weights
from model.kernels.allocator import keep_freed_memory
from model.loss import Objective
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from optim.config import OptimConfig
from parallel.engine import TorchEngine
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole
from train.checkpoint.manager import Checkpoints, Retention

CPU = torch.device("cpu")


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = parse(words)
    if args.out:
        check_output("--out", args.out, '"in front"')
    keep_freed_memory()
    engine, step = build(args)
    state = engine.state()
    size = sum(t.numel() * t.element_size() for t in state.values())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = measure(Path(folder), state, step, args)
    lines = {name: describe(values[1:]) for name, values in seconds.items()}
    share = lines["behind"]["median"] / lines["in front"]["median"]
    print(f"{args.model}: {size / 1e6:.1f} MB in {len(state)} tensors, {args.saves} saves of each"
          f" kind, {args.steps} steps between, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'seconds':32} {'median':>8} {'quartiles':>17} {'first save':>11}")
    titles = {"behind": "stands still, saved behind", "in front": "stands still, in front",
              "thread": "thread behind the steps"}  # fmt: skip
    for name, title in titles.items():
        line = lines[name]
        spread = f"{line['first_quartile']:.4f}-{line['third_quartile']:.4f}"
        print(f"{title:32} {line['median']:8.4f} {spread:>17} {seconds[name][0]:11.4f}")
    print(f"share of the time in front: {share:.1%}")
    if args.out:
        record = {"model": args.model, "bytes": size, "share": share, "seconds": seconds} | lines
        write_json(args.out, record)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", default="v4_nano", help="of conf/model")
    parser.add_argument("--saves", type=whole(least=1), default=8, help="of each kind that count")
    parser.add_argument("--steps", type=whole(least=1), default=2, help="between saves")
    parser.add_argument("--rows", type=whole(least=1), default=2, help="of a step")
    parser.add_argument("--seq-len", type=whole(least=1), default=128)
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary one")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    return parser.parse_args(words)


def build(args: argparse.Namespace) -> tuple[TorchEngine, Any]:
    """The engine, and a function that trains one step."""
    config = load_model_config(args.model)
    model = DeepSeekV4(config)
    init_weights(model, 0)
    counts = {key: getattr(config, key) for key in
              ("o_groups", "num_attention_heads", "index_n_heads")}  # fmt: skip
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(), None, counts)
    engine = TorchEngine(model, optimizer, CPU, 1.0)
    ids = torch.randint(1, config.vocab_size, (args.rows, args.seq_len))
    depths = 1 + config.num_nextn_predict_layers
    labels = torch.stack([ids.roll(-1 - k, dims=1) for k in range(depths)], dim=-1)
    batch = Batch(ids, torch.zeros_like(ids), labels)
    objective = Objective((float(ids.numel()),) * depths, float(ids.numel()), 0.3, 0.1, 0.1)

    def step() -> None:
        engine.forward_backward([batch], objective)
        engine.optimizer_step(1e-3, finite=True)

    return engine, step


def measure(
    folder: Path, state: dict[str, torch.Tensor], step: Any, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every save, the first of each kind included."""
    kinds = {
        "behind": Checkpoints(folder / "behind", Retention(last=1), background=True),
        "in front": Checkpoints(folder / "front", Retention(last=1)),
    }
    out: dict[str, list[float]] = {"behind": [], "in front": [], "thread": []}
    for number in range(1, args.saves + 2):
        for name, saves in kinds.items():
            began = time.perf_counter()
            saves.start(number, state, {})
            out[name].append(time.perf_counter() - began)
            for _ in range(args.steps):
                step()
            saves.require(number)
            if name == "behind":
                out["thread"].append(saves.background_seconds())
    return out


def describe(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4)
    names = ("first_quartile", "median", "third_quartile")
    return dict(zip(names, quartiles, strict=True))
