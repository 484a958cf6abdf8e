"""Run one small model under several layouts and print how far each is from one process.

    python scripts/layouts.py                                  # the default list, gloo on CPU
    python scripts/layouts.py dp_shard=2 ep=2 "dp_shard=4 ep=2" --model v4_tiny --steps 3

A layout is a list of degrees ("dp_replicate=2 dp_shard=2"); its ranks are the product of the data
degrees. Columns: loss of the first step and its difference from one process, the largest relative
distance of any reduced gradient (a gradient below 1e-4 of the global norm is measured against
that), whether the initial weights have the same bits, and the loss of the last step.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch import Tensor

from data.batch import IGNORE, Batch
from model.config import ModelConfig
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from optim.config import MatmulDtype, MuonConfig, OptimConfig
from parallel.collectives import whole
from parallel.config import ParallelConfig
from parallel.distributed import DistributedEngine
from parallel.engine import TorchEngine
from parallel.mesh import build_mesh, check_layout
from parallel.plan import build_sharded_model

DEFAULT = ["dp_shard=2", "dp_replicate=2 dp_shard=1", "dp_shard=2 ep=2", "dp_shard=4",
           "dp_replicate=2 dp_shard=2", "dp_shard=4 ep=4", "dp_shard=4 ep=2"]  # fmt: skip
CPU = torch.device("cpu")


def parse(text: str) -> ParallelConfig:
    """``"dp_shard=4 ep=2"`` as a layout."""
    degrees = {"dp_shard": 1}
    for part in text.split():
        key, _, value = part.partition("=")
        if key not in ("dp_replicate", "dp_shard", "ep", "pp", "cp") or not value.isdigit():
            raise ValueError(f"layout {text!r}: {part!r} is no degree")
        degrees[key] = int(value)
    layout = ParallelConfig(
        dp_replicate=degrees.get("dp_replicate", 1),
        dp_shard=degrees["dp_shard"],
        ep=degrees.get("ep", 1),
        pp=degrees.get("pp", 1),
        cp=degrees.get("cp", 1),
    )
    layout.validate()
    return layout


def read_model(name: str) -> ModelConfig:
    """A model of conf/model."""
    path = Path(__file__).resolve().parents[1] / "conf" / "model" / f"{name}.yaml"
    return ModelConfig(**yaml.safe_load(path.read_text()))


def random_batch(config: ModelConfig, rows: int, seq_len: int) -> Batch:
    """Rows of two documents of random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (rows, seq_len), generator=generator)
    cut = torch.randint(seq_len // 4, seq_len // 2, (rows, 1), generator=generator)
    documents = (torch.arange(seq_len) >= cut).long()
    labels = torch.full((rows, seq_len, 1 + config.num_nextn_predict_layers), IGNORE)
    for k in range(labels.shape[-1]):
        same = documents[:, 1 + k :] == documents[:, : -1 - k]
        labels[:, : -1 - k, k] = torch.where(same, ids[:, 1 + k :], IGNORE)
    return Batch(ids, documents, labels)


def run_steps(engine: TorchEngine, args: argparse.Namespace) -> dict[str, Any]:
    """Train; the first step's weights and gradients are kept whole."""
    assert isinstance(engine.model, DeepSeekV4)
    batch = random_batch(engine.model.config, args.rows, args.seq_len)
    counts = [
        float((batch.labels_BTK[..., k] >= 0).sum()) for k in range(batch.labels_BTK.shape[2])
    ]
    objective = Objective(tuple(counts), float(batch.input_ids_BT.numel()), 0.3, 0.1, 0.1)
    share = args.rows // engine.data_degree
    mine = slice(engine.data_rank * share, (engine.data_rank + 1) * share)
    own = [
        Batch(*(t[mine][i : i + args.micro] for t in vars(batch).values()))
        for i in range(0, share, args.micro)
    ]
    out: dict[str, Any] = {"losses": []}
    out["weights"] = {n: whole(p).clone() for n, p in engine.model.named_parameters()}
    for step in range(args.steps):
        out["losses"].append(float(engine.forward_backward(own, objective).total or 0.0))
        if step == 0:
            out["grads"] = {n: whole(p.grad).clone() for n, p in engine.model.named_parameters()
                            if p.grad is not None}  # fmt: skip
        engine.optimizer_step(args.lr, finite=True)
    return out


def optimizer_of(model: DeepSeekV4, group: dist.ProcessGroup | None = None) -> Any:
    """Muon with fp32 Newton-Schulz."""
    config = OptimConfig(muon=MuonConfig(dtype=MatmulDtype.fp32))
    counts = {key: getattr(model.config, key) for key in
              ("o_groups", "num_attention_heads", "index_n_heads")}  # fmt: skip
    return build_optimizer(model.named_parameters(), config, None, counts, group)


def alone(args: argparse.Namespace) -> dict[str, Any]:
    """One process."""
    model = DeepSeekV4(read_model(args.model))
    init_weights(model, 0)
    return run_steps(TorchEngine(model, optimizer_of(model), CPU, 1.0), args)


def on_rank(rank: int, text: str, folder: str, args: argparse.Namespace) -> None:
    """One rank of a layout; rank 0 writes what came out."""
    torch.set_num_threads(1)
    layout = parse(text)
    world = layout.world_size
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    config = read_model(args.model)
    mesh = build_mesh(layout, "cpu")
    model = build_sharded_model(config, mesh, CPU)
    optimizer = optimizer_of(model, mesh.data.get_group())
    result = run_steps(DistributedEngine(model, optimizer, CPU, 1.0, mesh), args)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


def worst(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The gradient farthest from one process's."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in theirs.values()))
    distances = [
        (float((mine[n].double() - g.double()).norm()) / max(float(g.norm()), 1e-4 * norm), n)
        for n, g in theirs.items()
    ]
    return max(distances)


def compare(text: str, one: dict[str, Any], args: argparse.Namespace) -> str:
    """The line of one layout."""
    layout = parse(text).resolve(parse(text).world_size)
    check_layout(layout, read_model(args.model))
    if args.rows % layout.row_degree:
        raise ValueError(f"--rows {args.rows} must be a multiple of {layout.row_degree} ({text})")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (text, folder, args), nprocs=layout.world_size)
        many = torch.load(f"{folder}/result.pt", weights_only=True)
    bits = all(torch.equal(many["weights"][n], w) for n, w in one["weights"].items())
    distance, name = worst(many["grads"], one["grads"])
    first, last = many["losses"][0], many["losses"][-1]
    return (
        f"{text:28} {layout.world_size:5} {'same' if bits else 'DIFFER':>8} {first:12.7f}"
        f" {first - one['losses'][0]:10.1e} {distance:10.1e} {last:12.7f}"
        f" {last - one['losses'][-1]:10.1e}  {name}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("layouts", nargs="*", default=DEFAULT, help="degrees of each layout")
    parser.add_argument("--model", default="v4_tiny", help="of conf/model")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of a global batch")
    parser.add_argument("--micro", type=int, default=8, help="rows of a microbatch on a rank")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    one = alone(args)
    print(f"{'layout':28} {'ranks':>5} {'weights':>8} {'loss 1':>12} {'diff':>10} {'gradient':>10}"
          f" {f'loss {args.steps}':>12} {'diff':>10}  farthest gradient")  # fmt: skip
    print(f"{'one process':28} {1:5} {'':8} {one['losses'][0]:12.7f} {'':10} {'':10}"
          f" {one['losses'][-1]:12.7f}")  # fmt: skip
    for text in args.layouts:
        try:
            print(compare(text, one, args), flush=True)
        except ValueError as error:
            print(f"{text:28} refused: {error}")


if __name__ == "__main__":
    main()
