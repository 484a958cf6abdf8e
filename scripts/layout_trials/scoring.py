"""What the balanced scoring order gains (``parallel.cp_scoring``): time of the choice, by rank.

    python scripts/bench.py scoring
    python scripts/bench.py scoring --cp 4 --tokens 32768 --document 8192

One CSA layer of a model: the queries of a row in shards, the keys of all its entries, and the
choice as the layer makes it, the balanced order with its exchanges. Gloo processes of this machine,
one thread each, fp32. Orders take turns and their time is the process's CPU seconds, medians of the
rounds, so that other work on the machine, and ranks that share a core, change little. A step waits
for the costliest rank: ``gain`` is that rank's time in its own order over that in the balanced one,
``counted`` the same of the scores that queries ask for.
"""

# Legend: B rows, T tokens, S tokens of a shard, J indexer heads, L indexer head dim, E entries
from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.config import Kernels, LayerKind
from model.kernels.select import select
from model.scoring_order import balanced_halves, heaviest, own_halves
from model.sequence_plan import SequenceShard, build_sequence_plan, scoring_work
from parallel.config import CpScoring
from parallel.context_parallel import ShardedRows
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole
from train.errors import UserError

ORDERS = (CpScoring.own, CpScoring.balanced)


def on_rank(rank: int, ratio: int, args: argparse.Namespace, folder: str) -> None:
    """One process; writes its CPU seconds by order and round."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.cp
    )
    group = dist.group.WORLD
    assert group is not None
    config = load_model_config(args.model)
    topk, index_topk = config.index_topk, select("index_topk", Kernels.auto)
    documents_BT = _documents(args)
    generator = torch.Generator().manual_seed(rank)
    S, J, L = args.tokens // args.cp, config.index_n_heads, config.index_head_dim
    q_BSJL = torch.randn(1, S, J, L, generator=generator)
    w_BSJ = torch.randn(1, S, J, generator=generator)
    ways = []
    for order in ORDERS:
        balanced = order is CpScoring.balanced
        shard = SequenceShard(rank, args.cp, balanced)
        plan = build_sequence_plan(documents_BT, (ratio,), config.sliding_window, shard)
        ways.append((order, ShardedRows(group, balanced), plan.compressed[ratio]))
    entries = args.tokens // ratio
    k_BEL = torch.randn(1, entries, L, generator=torch.Generator().manual_seed(args.cp))

    def score(q: Any, w: Any, first: Any, stop: Any, bounds: Any) -> Any:
        return index_topk((q, k_BEL, w), first, stop, topk, bounds)

    seconds: dict[str, list[float]] = {order.value: [] for order in ORDERS}
    for number in range(1 + args.rounds):
        for order, rows, plan in ways:
            dist.barrier()
            began = time.process_time()
            rows.to_score(q_BSJL, w_BSJ, plan).choose(score)
            if number:  # the first call builds and warms
                seconds[order.value].append(time.process_time() - began)
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds, allow_nan=False))
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians by order and rank, and what they should be."""
    config = load_model_config(args.model)
    layers = range(config.num_hidden_layers)
    ratio = next(config.ratio(i) for i in layers if config.kind(i) is LayerKind.csa)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (ratio, args, folder), nprocs=args.cp)
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(args.cp)]
    seconds = {o.value: [statistics.median(rank[o.value]) for rank in ranks] for o in ORDERS}
    whole_rows = build_sequence_plan(_documents(args), (ratio,)).compressed[ratio]
    work = scoring_work(whole_rows.first_BT, whole_rows.stop_BT, args.cp)
    own, balanced = (heaviest(order(work), work) for order in (own_halves, balanced_halves))
    return {
        "cpu_seconds": seconds, "rounds": ranks,
        "gain": max(seconds["own"]) / max(seconds["balanced"]), "counted": own / balanced,
        "costliest_over_cheapest": {k: max(v) / min(v) for k, v in seconds.items()},
    }  # fmt: skip


def _documents(args: argparse.Namespace) -> torch.Tensor:
    return (torch.arange(args.tokens) // (args.document or args.tokens))[None]


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = options().parse_args(words)
    if args.json:
        check_output("--json", Path(args.json), '"costliest_over_cheapest"')
    if args.tokens % (2 * args.cp):
        raise UserError(f"--tokens {args.tokens} must be a multiple of 2 * --cp={2 * args.cp}")
    if args.cp < 2:
        raise UserError(f"--cp {args.cp} must be at least 2: one rank has nobody to share with")
    found = measure(args)
    length = args.document or args.tokens
    print(f"{args.model}, a row of {args.tokens:,} tokens in {args.cp} shards, documents of"
          f" {length:,}: CPU seconds of one layer's choice, medians of {args.rounds}")  # fmt: skip
    for order, seconds in found["cpu_seconds"].items():
        by_rank = " ".join(f"{one:8.3f}" for one in seconds)
        ratio = found["costliest_over_cheapest"][order]
        print(f"{order:>9} {by_rank}   costliest over cheapest {ratio:.2f}")
    print(f"     gain {found['gain']:.2f} of the costliest rank, counted {found['counted']:.2f}")
    if args.json:
        asked = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(Path(args.json), {"asked": asked, "torch": torch.__version__, **found})
    return 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="v4_tiny", help="of conf/model")
    parser.add_argument("--tokens", type=whole(least=2), default=16384, help="of the row")
    parser.add_argument(
        "--document", type=whole(least=1), help="tokens of a document (default: the row)"
    )
    parser.add_argument("--cp", type=whole(least=1), default=2, help="shards")
    parser.add_argument("--rounds", type=whole(least=1), default=5, help="of both orders")
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    return parser
