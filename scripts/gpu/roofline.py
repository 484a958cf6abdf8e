"""How fast a block and a whole pass can be on a card at most: computed, no GPU runs anything.

    python scripts/bench.py roofline --markdown docs/bench/roofline.md

A pass is traced on meta tensors of the real shapes with the kernels that a GPU takes, as
``bench launches`` does. Each operation then has its FLOPs (of its shapes, or of what
``model/flops.py`` counts for it), its bytes (every operand read once, every result written once:
caches and repeated reads are left out), and its launches. It takes the longest of FLOPs at the
card's peak rate, bytes at its bandwidth, and launches at a fixed time; operations follow one
another. What is recomputed, the optimizer and the data are not in it. Then: what the sums over the
queries that chose an entry cost in one order, and added atomically (``model.deterministic``).
"""

# Legend: B rows, T tokens, S streams, D hidden, V vocabulary, K prediction depths, P pairs of a
# query and an entry that it chose, C channels
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.config import Kernels, LayerKind, ModelConfig
from model.flops import block_flops
from scripts.benchmarks.launches import kinds
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_text
from scripts.cli.parser import CommandParser, whole
from scripts.gpu.traffic import Operation, block_traffic, model_traffic
from train.preflight.cards import CARDS, Card, card
from train.preflight.forecast import quantity

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Beginnings of the names of operations -> how model/kernels/select.py, or a layer, calls them.
NAMES = (
    ("aten::mm", "linear"), ("aten::bmm", "block_linear"),
    ("v4::triton_blocks", "block_linear"), ("v4::triton_attention", "attention"),
    ("v4::triton_pack_bits", "attention"), ("v4::triton_list_lengths", "attention"),
    ("v4::triton_indexer_loss", "indexer_loss"), ("v4::triton_index_topk", "index_topk"),
    ("v4::triton_grouped", "grouped_linear"), ("v4::triton_gate", "route"),
    ("v4::triton_expert_order", "expert_order"), ("v4::triton_balance", "load_and_balance"),
    ("v4::triton_document_counts", "load_and_balance"), ("v4::triton_send", "send"),
    ("v4::triton_row_sums", "collect"), ("v4::triton_pool", "pool_entries"),
    ("v4::triton_rms_norm", "rms_norm, norm_rope"), ("v4::triton_rope", "rope, rope_back"),
    ("v4::triton_swiglu", "swiglu"), ("v4::triton_mhc_pre", "mhc_pre"),
    ("v4::triton_mhc_merge_pre", "mhc_merge_pre"),
    ("v4::triton_mhc_merge", "mhc_merge"), ("v4::triton_mhc_head", "mhc_head"),
    ("v4::triton_cross_entropy", "cross_entropy"), ("aten::_to_copy", "casts"),
    ("aten::add", "sums of gradients"),
)  # fmt: skip


@dataclass
class PassTime:
    """What a pass comes to.

    Attributes:
        flops: forward and backward.
        bytes: likewise.
        launches: likewise.
        seconds: by card, least.
    """

    flops: float
    bytes: float
    launches: float
    seconds: dict[str, float]

    def plus(self, other: PassTime, times: float = 1.0) -> PassTime:
        """This and some of another."""
        return PassTime(
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
            self.launches + times * other.launches,
            {name: s + times * other.seconds[name] for name, s in self.seconds.items()},
        )


def estimate(operations: Iterable[Operation], cards: Sequence[Card]) -> PassTime:
    """The sums over operations, one after another."""
    found = list(operations)
    return PassTime(
        sum(o.calls * o.flops for o in found),
        sum(o.calls * o.bytes for o in found),
        sum(o.calls * o.launches for o in found),
        {one.name: sum(o.seconds(one)[0] for o in found) for one in cards},
    )


def whole_pass(
    config: ModelConfig,
    rows: int,
    seq_len: int,
    cards: Sequence[Card],
    head: torch.dtype,
    recompute: bool = False,
) -> PassTime:
    """Forward and backward of a whole model: its blocks, and what a model of one block has beside.

    Args:
        config: the model, its kernels those of a GPU.
        rows: of the microbatch.
        seq_len: tokens of a row.
        cards: to estimate for.
        head: dtype of the head's products.
        recompute: blocks run forward once more (``train.activation_checkpoint=block``).
    """
    ahead = config.num_nextn_predict_layers
    one = replace(
        config, num_hidden_layers=1, layer_kinds=["swa"], compress_ratios=[0] * (1 + ahead),
        routers=[], num_hash_layers=0,
    )  # fmt: skip

    def block(of: ModelConfig, layer: int) -> PassTime:
        found = block_traffic(of, layer, rows, seq_len)
        return estimate([*found.all, *(found.forward if recompute else ())], cards)

    plain = block_traffic(one, 0, rows, seq_len)  # its block, and that of every MTP depth
    total = estimate(model_traffic(one, rows, seq_len, head).all, cards)
    total = total.plus(estimate(plain.all, cards), -1)
    if recompute:
        total = total.plus(estimate(plain.forward, cards), ahead)
    of_kind = {name: block(config, layer) for name, layer in kinds(config).items()}
    for layer in range(config.num_hidden_layers):
        total = total.plus(of_kind[f"{config.kind(layer).value}, {config.router(layer).value}"])
    return total


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Compute, print, write."""
    args = _arguments(words)
    if args.markdown:
        check_output("--markdown", args.markdown, "scripts/bench.py roofline")
    cards = [card(name) for name in args.cards]
    lines = _head(words, args)
    for name in args.models:
        config = replace(load_model_config(name), kernels=Kernels.triton)
        lines += [f"## {name}", "", *_blocks(config, args, cards), ""]
        lines += [*_operations(config, args, cards), "", *_model(config, args, cards), ""]
        lines += [*_sums(config, args, cards), ""]
    document = "\n".join(lines)
    print(document)
    if args.markdown:
        write_text(args.markdown, document)


def _head(words: Sequence[str] | None, args: argparse.Namespace) -> list[str]:
    again = "every block" if args.recompute else "nothing"
    shown = " ".join(["python scripts/bench.py roofline", *(words or sys.argv[1:])])
    return [
        "# Roofline: computed, not measured",
        "",
        f"Made by `{shown}` on {time.strftime('%Y-%m-%d')}: no GPU ran anything. A"
        f" microbatch is {args.rows} x {args.tokens:,} tokens, each row one document; bf16 with"
        f" fp32 sums, head in {args.head}, all losses, {again} recomputed,"
        " no optimizer.",
        "",
        "An operation takes the longest of: its FLOPs at the peak rate (fp32 ones without TF32),"
        " its bytes (every operand once, every result once) at the bandwidth, 4 us a launch. What"
        " is read again because caches are small, and what a backward kernel computes again, is"
        " left out: these are bounds that no run passes. Peaks are the makers'"
        " (`train/preflight/cards.py`).",
        "",
    ]


def _blocks(config: ModelConfig, args: argparse.Namespace, cards: Sequence[Card]) -> list[str]:
    rows = [("block", "pass", "GFLOPs", "MB", "launches", *(f"{c.name}, us" for c in cards))]
    for name, layer in kinds(config).items():
        found = block_traffic(config, layer, args.rows, args.tokens)
        for what, operations in (("forward", found.forward), ("backward", found.backward)):
            e = estimate(operations, cards)
            times = (f"{e.seconds[c.name] * 1e6:,.0f}" for c in cards)
            sizes = f"{e.flops / 1e9:,.1f}", f"{e.bytes / 1e6:,.0f}", f"{e.launches:,.0f}"
            rows.append((name, what, *sizes, *times))
    return _table(rows)


def _operations(config: ModelConfig, args: argparse.Namespace, cards: Sequence[Card]) -> list[str]:
    """Of the costliest block: each op, forward and backward, with what binds it on each card."""
    layer = max(kinds(config).values(), key=lambda i: block_flops(config, i, args.tokens).total)
    groups: dict[str, list[Operation]] = {}
    for operation in block_traffic(config, layer, args.rows, args.tokens).all:
        groups.setdefault(called(operation.name), []).append(operation)
    kind, router = config.kind(layer).value, config.router(layer).value
    rows = [
        (f"op ({kind}, {router})", "GFLOPs", "MB", "launches", *(f"{c.name}, us" for c in cards))
    ]
    first = cards[0]
    for name, found in sorted(
        groups.items(), key=lambda item: -estimate(item[1], [first]).seconds[first.name]
    ):
        e = estimate(found, cards)
        rows.append(
            (
                name, f"{e.flops / 1e9:,.1f}", f"{e.bytes / 1e6:,.0f}", f"{e.launches:,.0f}",
                *(f"{e.seconds[c.name] * 1e6:,.0f} {_binding(found, c)}" for c in cards),
            )
        )  # fmt: skip
    return _table(rows)


def _binding(operations: Iterable[Operation], one: Card) -> str:
    """What binds most of their time."""
    spent: dict[str, float] = {}
    for operation in operations:
        seconds, binding = operation.seconds(one)
        spent[binding] = spent.get(binding, 0.0) + seconds
    return max(spent, key=lambda name: spent[name])


def _model(config: ModelConfig, args: argparse.Namespace, cards: Sequence[Card]) -> list[str]:
    tokens = args.rows * args.tokens
    head = _DTYPES[args.head]
    total = whole_pass(config, args.rows, args.tokens, cards, head, args.recompute)
    rows = [("card", "ms a microbatch", "tokens/s at most", "share of the bf16 peak")]
    for one in cards:
        seconds = total.seconds[one.name]
        share = total.flops / seconds / (one.bf16_tflops * 1e12)
        rows.append((one.name, f"{seconds * 1e3:,.1f}", f"{tokens / seconds:,.0f}", f"{share:.0%}"))
    return [
        f"The whole model, forward and backward, computed: {quantity(total.flops)}FLOPs,"
        f" {total.bytes / 1e9:,.1f} GB and {total.launches:,.0f} launches a microbatch, as if it"
        " had room on one card.",
        "",
        *_table(rows),
    ]


@dataclass(frozen=True)
class PairSums:
    """The backward pass of an op that sums what queries give to the entries they chose.

    Attributes:
        met: ``list`` of entries, or ``bits``: a mask over all, where there is nothing to sum.
        launches: of the whole op.
        workspace: bytes that are written and read again: a fp32 row of a pair, its owner and
            place before and after sorting.
        added: bytes of fp32 that are added atomically.
    """

    met: str
    launches: int
    workspace: int
    added: int


def pair_sums(config: ModelConfig, layer: int, rows: int, seq_len: int) -> dict[str, PairSums]:
    """How a block's two ops sum over pairs, by what it starts.

    Args:
        config: the model, its kernels those of a GPU.
        layer: number of a block that chooses entries.
        rows: of the microbatch.
        seq_len: tokens of a row.
    """
    found = block_traffic(config, layer, rows, seq_len)
    masked = any(o.name == "v4::triton_pack_bits" for o in found.forward)
    chosen = min(config.index_topk, seq_len // config.ratio(layer))
    sums = {}
    for op, channels, bits in (
        ("attention", config.head_dim, masked), ("indexer_loss", config.index_head_dim, False),
    ):  # fmt: skip
        name = f"v4::triton_{op}_backward"
        launches = sum(o.calls * o.launches for o in found.backward if o.name == name)
        pairs = 0 if bits else rows * seq_len * chosen
        kept, added = (_PAIR + 8 * channels, 0) if config.deterministic else (0, 4 * channels)
        sums[op] = PairSums("bits" if bits else "list", launches, pairs * kept, pairs * added)
    return sums


# int32 owner written and read; owner and int64 place of the sorted ones written and read.
_PAIR = 2 * 4 + 2 * (4 + 8)


def _sums(config: ModelConfig, args: argparse.Namespace, cards: Sequence[Card]) -> list[str]:
    """In one order and atomically, at the rows' length and at four times as much."""
    layer = next((i for i in kinds(config).values() if config.kind(i) is LayerKind.csa), None)
    if layer is None:
        return []
    heads = "order", "tokens", "op", "met as", "launches", "workspace, MB", "added, MB"
    lines: list[tuple[str, ...]] = [(*heads, *(f"{c.name}, us" for c in cards))]
    for tokens in (args.tokens, 4 * args.tokens):
        for order in (True, False):
            asked = replace(config, deterministic=order)
            for op, s in pair_sums(asked, layer, args.rows, tokens).items():
                sizes = f"{s.workspace / 1e6:,.0f}", f"{s.added / 1e6:,.0f}"
                times = (f"{(s.workspace + s.added) / c.bandwidth_gb / 1e3:,.0f}" for c in cards)
                how = "one" if order else "none"
                lines.append((how, f"{tokens:,}", op, s.met, f"{s.launches}", *sizes, *times))
    return [
        "Sums over the queries that chose an entry, backward pass of a csa block: in one order, or"
        " in none (`model.deterministic=false`). Launches are of the whole op; times are those of"
        " the bytes at the card's bandwidth, atomic ones too, which a cache may serve faster and"
        " meetings at one entry slow down.",
        "",
        *_table(lines),
    ]


def called(name: str) -> str:
    """The op of ``model/kernels/select.py`` that an operation serves; ``linear``; or others."""
    return next((op for begin, op in NAMES if name.startswith(begin)), "others")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["v4_small", "v4_flash"])
    parser.add_argument(
        "--cards", nargs="+", default=["rtx4090", "h100"], help=", ".join(c.name for c in CARDS)
    )
    parser.add_argument("--tokens", type=whole(least=1), default=4096, help="of a row")
    parser.add_argument("--rows", type=whole(least=1), default=1, help="of a microbatch")
    parser.add_argument("--recompute", action="store_true", help="the whole model's blocks twice")
    parser.add_argument(
        "--head", choices=tuple(_DTYPES), default="fp32", help="train.head_precision"
    )
    parser.add_argument("--markdown", type=Path, help="also write it as a document")
    return parser.parse_args(words)
