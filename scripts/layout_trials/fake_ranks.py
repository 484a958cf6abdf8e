"""Build a large layout's real ranks without its machines: every placement, and the bytes per rank.

    python scripts/bench.py fake_ranks v4_flash     # conf/parallel/v4_flash.yaml: 512 ranks
    python scripts/bench.py fake_ranks v4_pro --csv runs/v4_pro_placements.csv
    python scripts/bench.py fake_ranks v4_flash --set parallel.pp=1 parallel.dp_shard=512

One process joins a process group that only pretends (torch's "fake" backend) and builds, on the
meta device, what a rank would build: the model with its pipeline stages, sharded by FSDP2 and
expert parallelism, and the optimizer with its states. It does so as the first rank of every
pipeline stage, which holds the most, and compares bytes with the table of
``train/preflight/fit.py`` that refuses or admits a run.

Nothing large may be whole on every rank: a parameter or optimizer state of more than --whole
elements that is not sharded breaks the check, as do bytes 1 % off, and a matrix that Muon would
orthogonalise twice or never. Exit codes: 0 all well, 1 not, 2 input that cannot be.
"""

from __future__ import annotations

import argparse
import csv
import re
import resource
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.parameter_counts import parameter_shapes
from optim.build import Optimizer, build_optimizer
from optim.muon_distributed import ShardedMuon
from parallel.mesh import Mesh, build_mesh, check_layout
from parallel.pipeline_stage import ModelPart
from parallel.sharded_model import build_sharded_model
from quant.apply import reads_master
from scripts.cli.command import command
from scripts.cli.parser import CommandParser, whole
from train.config.command_line import compose_run
from train.config.schema import RunConfig
from train.errors import UserError
from train.preflight.needs import Memory, Needs
from train.stages import resolve

META = torch.device("meta")
TOLERANCE = 0.01  # of the fit table, fraction


@dataclass(frozen=True)
class Placed:
    """A tensor on one rank.

    Attributes:
        name: of the parameter, with the state's name for optimizer states.
        kind: ``parameter`` or ``state``.
        shape: of the whole tensor.
        local: of this rank's shard.
        placement: how each mesh axis cuts it, e.g. ``ep=Shard(0) dp_shard=Shard(1)``.
        bytes: on this rank.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    placement: str
    bytes: int

    @property
    def whole(self) -> bool:
        """Whether this rank holds all of it."""
        return self.shape == self.local


@dataclass
class RankPart:
    """What one rank builds.

    Attributes:
        tensors: parameters and optimizer states.
        unowned: Muon's matrices that no rank, or more than one, orthogonalises.
        work: largest Newton-Schulz share of a rank over the mean.
    """

    tensors: list[Placed]
    unowned: list[str]
    work: float

    def bytes_of(self, kind: str) -> int:
        """Of all tensors of a kind."""
        return sum(tensor.bytes for tensor in self.tensors if tensor.kind == kind)


def placed(name: str, kind: str, tensor: Tensor) -> Placed:
    """Where a tensor is."""
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return Placed(name, kind, shape, shape, "whole", tensor.numel() * tensor.element_size())
    local = tensor.to_local()
    axes = tensor.device_mesh.mesh_dim_names or ()
    placement = " ".join(f"{axis}={at}" for axis, at in zip(axes, tensor.placements, strict=True))
    size = local.numel() * local.element_size()
    return Placed(name, kind, tuple(tensor.shape), tuple(local.shape), placement, size)


def build_rank(run: RunConfig, rank: int, world_size: int) -> RankPart:
    """Build one rank's model and optimizer on the meta device."""
    layout = run.parallel.resolve(world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = build_mesh(layout, "cpu")
        model = build_sharded_model(
            run.model, mesh, META, run.train.precision.value, run.train.activation_checkpoint.value,
            run.seed, None, partial(reads_master, run.quant), resolve(run).longest_row,
        )  # fmt: skip
        optimizer = build_optimizer(
            model.named_parameters(), run.optim, split_counts=run.model.split_counts,
            group=mesh.data.get_group(), shapes=parameter_shapes(run.model),
        )  # fmt: skip
        tensors = [placed(n, "parameter", p) for n, p in model.named_parameters()]
        stages = model.stages if isinstance(model, ModelPart) else []
        tensors += [
            placed("embed.weight (MTP's copy)", "parameter", stage.embed.weight)
            for stage in stages
            if stage.copies_embedding
        ]
        for name, states in optimizer.state_dict().items():
            tensors += [placed(f"{name}.{key}", "state", t) for key, t in states.items()]
        return RankPart(tensors, *muon_work(optimizer, mesh))
    finally:
        dist.destroy_process_group()


def muon_work(optimizer: Optimizer, mesh: Mesh) -> tuple[list[str], float]:
    """Matrices without exactly one owner, and how even the work is over the data ranks."""
    muon = next((e for e in optimizer._engines.values() if isinstance(e, ShardedMuon)), None)
    if muon is None or not muon.entries:
        return [], 1.0
    owners: Counter[tuple[str, int]] = Counter()
    load = [0.0] * mesh.data.size()
    for now in muon._plan(tuple(muon.entries)):
        for rank, matrices in now.owned.items():
            owners.update((matrix.name, matrix.index) for matrix in matrices)
            small, large = sorted((now.rows, now.cols))
            load[rank] += len(matrices) * small * small * large
    expected = {(e.name, i) for e in muon.entries.values() for i in range(e.num_matrices)}
    wrong = {key for key, count in owners.items() if count != 1} | (expected ^ owners.keys())
    return sorted(f"{name}[{i}]" for name, i in wrong), max(load) * len(load) / sum(load)


def summary(tensors: Iterable[Placed]) -> list[str]:
    """One line for tensors of equal role, shape and placement, layers counted."""
    groups: Counter[tuple[str, str, str, str, int]] = Counter()
    for t in tensors:
        role = re.sub(r"\.\d+\.", ".*.", t.name)
        groups[
            role, "x".join(map(str, t.shape)), "x".join(map(str, t.local)), t.placement, t.bytes
        ] += 1
    return [
        f"  {count:3} x {role:52} {shape:>18} -> {local:>16}  {placement}"
        for (role, shape, local, placement, _), count in groups.items()
    ]


def compare(ranks: list[RankPart], fit: Memory) -> list[str]:
    """Lines of measured bytes beside the fit table; those off by more than 1 % say so."""
    lines = []
    for kind, expected in (("parameter", fit.weights), ("state", fit.optimizer)):
        most = max(part.bytes_of(kind) for part in ranks)
        off = most / expected - 1
        verdict = "ok" if abs(off) <= TOLERANCE else "BROKEN"
        lines.append(
            f"{kind}s: {most:,} bytes on the fullest rank, {expected:,} in the fit table"
            f" ({off:+.2%}) {verdict}"
        )
    return lines


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Build, compare, print; the exit code."""
    args = options().parse_args(words)
    began = time.perf_counter()
    run = compose_run([f"model={args.model}", f"parallel={args.parallel or args.model}", *args.set])
    degrees = run.parallel
    ranks = degrees.pp * degrees.dp_replicate * degrees.dp_shard * degrees.cp
    if ranks < 1:
        raise UserError(f"parallel.dp_shard={degrees.dp_shard}: give a number of ranks")
    layout = degrees.resolve(ranks)
    check_layout(layout, run.model)
    stage_ranks = [stage * layout.data_degree for stage in range(layout.pp)]
    parts = []
    for stage, rank in enumerate(stage_ranks):
        parts.append(build_rank(run, rank, ranks))
        part = parts[-1]
        print(f"rank {rank} (pp {stage} of {layout.pp}): {part.bytes_of('parameter'):,} bytes of"
              f" parameters, {part.bytes_of('state'):,} of optimizer states; Newton-Schulz: fullest"
              f" rank {part.work:.2f}x the mean")  # fmt: skip
        if args.list or stage == 0:
            print("\n".join(summary(part.tensors)), flush=True)
    if args.csv:
        write_csv(Path(args.csv), zip(stage_ranks, parts, strict=True))
    whole = [t for part in parts for t in part.tensors
             if t.whole and torch.Size(t.shape).numel() > args.whole]  # fmt: skip
    lines = compare(parts, Needs(run, resolve(run)).peak(layout, "cuda"))
    lines += [f"whole on every rank: {t.name} {t.shape} BROKEN" for t in whole]
    lines += [f"no single owner: {name} BROKEN" for part in parts for name in part.unowned[:5]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print("\n".join([f"{run.model.name} on {ranks} ranks, {layout}", *lines]))
    print(f"{time.perf_counter() - began:.1f} s, {peak:.2f} GB at the peak")
    return 1 if any(line.endswith("BROKEN") for line in lines) else 0


def write_csv(path: Path, parts: Iterable[tuple[int, RankPart]]) -> None:
    """Every tensor of every rank that was built."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "name", "kind", "shape", "local", "placement", "bytes"])
        for rank, part in parts:
            for t in part.tensors:
                shapes = ("x".join(map(str, t.shape)), "x".join(map(str, t.local)))
                writer.writerow([rank, t.name, t.kind, *shapes, t.placement, t.bytes])


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", help="of conf/model")
    parser.add_argument("--parallel", help="of conf/parallel (default: named as the model)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other config")
    parser.add_argument("--list", action="store_true", help="placements of every pipeline rank")
    parser.add_argument("--csv", metavar="FILE", help="write every tensor of every built rank")
    parser.add_argument(
        "--whole",
        type=whole(least=0),
        default=1_000_000,
        help="elements that may be whole on every rank",
    )
    return parser
