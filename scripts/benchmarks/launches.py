"""How many kernels a block starts on a GPU: counted on meta tensors, so without one.

    python scripts/bench.py launches --markdown docs/bench/launches.md

Counted are Triton launches and the aten operations that compute, also those inside operators;
views, allocations and what touches host tensors alone start nothing. A block is traced by itself,
forward and backward, with all its losses, in bf16 and with weight copies, as the second and further
microbatches of a step see it but for the addition to each gradient that stands already (one
``add_`` a parameter).
"""

# Legend: B rows, T tokens, S streams, D hidden
from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.block import Block
from model.config import Kernels, ModelConfig
from model.context import build_context
from model.kernels.triton.launch import IMPLEMENTATIONS, counted
from model.weight_copies import WeightCopies
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_text
from scripts.cli.parser import CommandParser, whole
from train.errors import ROOT, ExitCode

FORWARD, BACKWARD = 60, 130  # launches a block
CHUNK = 6  # launches a chunk of fixed bytes
PLAIN_CHUNK = 25  # of the plain path, a chunk of 256 queries of one of its loops
_NOTHING = {"detach", "lift_fresh", "_unsafe_view", "empty", "new_empty", "empty_like",
            "empty_strided", "new_empty_strided"}  # fmt: skip


class LaunchCounter(TorchDispatchMode):
    """Counts what would start a kernel while it is active.

    Attributes:
        launches: ``(operator or "", kernel or aten operation)`` -> how often; the operator is the
            one of ``torch.ops.v4`` inside which it runs; with ``within``, the function there.

    Args:
        within: end of a file's path: operations are counted by its functions.
    """

    def __init__(self, within: str = "") -> None:
        super().__init__()
        self.within = within
        self.launches: Counter[tuple[str, str]] = Counter()
        self._inside = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        implementation = IMPLEMENTATIONS.get(name)
        if implementation is None:
            out = func(*args, **(kwargs or {}))
            if computes(func) and not _on_host((args, kwargs, out)):
                inside = _function_of(self.within) if self.within else self._inside
                self.launches[inside, name] += 1
            return out
        outside, self._inside = self._inside, name
        try:
            with self, counted() as kernels:
                out = implementation(*args, **(kwargs or {}))
        finally:
            self._inside = outside
        for kernel, count in kernels.items():
            self.launches[name, kernel] += count
        return out


def computes(func: Any) -> bool:
    """Whether an operation starts a kernel: it is neither a view nor an allocation."""
    if func._schema.name.partition("::")[2] in _NOTHING:
        return False
    returns = func._schema.returns
    view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not view


def _on_host(tree: Any) -> bool:
    """Whether all tensors of a call are the host's: those of a device are meta here."""
    return all(t.device.type == "cpu" for t in tree_leaves(tree) if isinstance(t, torch.Tensor))


def _function_of(file: str) -> str:
    """The outermost function of a file that is running; empty: none is."""
    found, frame = "", sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            found = frame.f_code.co_qualname
        frame = frame.f_back
    return found


@dataclass
class BlockLaunches:
    """What one block starts.

    Attributes:
        name: which block.
        forward: launches of its forward pass.
        backward: those of its backward pass.
        functions: files of this project whose functions ran in either.
    """

    name: str
    forward: Counter[tuple[str, str]]
    backward: Counter[tuple[str, str]]
    functions: set[str] = field(default_factory=set)


def block_pass(
    config: ModelConfig,
    layer: int,
    tokens: int,
    rows: int = 1,
    documents: int = 1,
    within: str = "",
) -> BlockLaunches:
    """Trace a block with all its losses on meta tensors.

    Args:
        config: the model, with the kernels to count.
        layer: number of the block.
        tokens: of a row.
        rows: of a microbatch.
        documents: packed into each row.
        within: see :class:`LaunchCounter`; then no functions are collected.
    """
    block = meta_block(config, layer)
    forward, backward = LaunchCounter(within), LaunchCounter(within)
    with nullcontext(set[str]()) if within else functions_called() as functions:
        trace_block(block, config, tokens, forward, backward, rows, documents)
    kind, router = config.kind(layer).value, config.router(layer).value
    return BlockLaunches(f"{kind}, {router}", forward.launches, backward.launches, functions)


def meta_block(config: ModelConfig, layer: int) -> Block:
    """A block on the meta device: shapes without values."""
    with torch.device("meta"):
        return Block(
            config, config.kind(layer), config.ratio(layer), config.router(layer), f"layers.{layer}"
        )


def trace_block(
    block: Block,
    config: ModelConfig,
    tokens: int,
    forward: TorchDispatchMode,
    backward: TorchDispatchMode,
    rows: int = 1,
    documents: int = 1,
) -> None:
    """Run a block with all its losses where its parameters are.

    Args:
        block: of the model.
        config: of the model.
        tokens: of a row.
        forward: active in its forward pass.
        backward: active in its backward pass.
        rows: of a microbatch.
        documents: packed into each row.
    """
    device = next(block.parameters()).device
    WeightCopies(nn.ModuleDict({"layers": nn.ModuleDict({"0": block})})).refresh(torch.bfloat16)
    document_T = torch.arange(tokens) * documents // tokens
    context = build_context(config, document_T.expand(rows, -1), True, device)
    context.indexer_loss = context.balance_loss = True
    x_BTSD = torch.ones(
        rows, tokens, config.num_streams, config.hidden_size, device=device, dtype=torch.bfloat16,
        requires_grad=True,
    )  # fmt: skip
    ids_BT = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    with forward:
        out_BTSD, aux = block(x_BTSD, ids_BT, context)
    ends = [out_BTSD, *(aux[name] for name in ("indexer_kl", "balance") if name in aux)]
    grads = [torch.ones_like(end) for end in ends]
    with backward:
        torch.autograd.backward(ends, grads)


@contextmanager
def functions_called() -> Iterator[set[str]]:
    """``file:function`` of this project's functions that are called while it is open."""
    called: set[str] = set()
    root = str(ROOT)

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            called.add(f"{Path(code.co_filename).relative_to(root)}:{code.co_name}")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield called
    finally:
        sys.setprofile(before)


def kinds(config: ModelConfig) -> dict[str, int]:
    """One layer of each kind of attention and router: name -> its number."""
    found: dict[str, int] = {}
    for layer in range(config.num_hidden_layers):
        found.setdefault(f"{config.kind(layer).value}, {config.router(layer).value}", layer)
    return found


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    args = _arguments(words)
    if args.markdown:
        check_output("--markdown", Path(args.markdown), "scripts/bench.py launches")
    sections, over = [], 0
    for name in args.model:
        passes = [
            (tokens, block_pass(config, layer, tokens))
            for config in [replace(load_model_config(name), kernels=Kernels.triton)]
            for layer in kinds(config).values()
            for tokens in args.tokens
        ]
        over += sum(
            sum(p.forward.values()) > FORWARD or sum(p.backward.values()) > BACKWARD
            for tokens, p in passes
            if tokens == args.tokens[0]
        )
        sections += [f"## {name}", "", *_table(passes), "", *_operations(passes[-1][1]), ""]
    if not args.no_plain:
        sections += ["## The plain path, in chunks", "", *_plain(args.model[0])]
    document = "\n".join([*_head(words), *sections]) + "\n"
    print(document)
    if args.markdown:
        write_text(Path(args.markdown), document)
    return ExitCode.failure if over else ExitCode.finished


def _head(words: Sequence[str] | None) -> list[str]:
    shown = " ".join(["python scripts/bench.py launches", *(words or sys.argv[1:])])
    return [
        "# Launches of a block",
        "",
        f"Made by `{shown}`, on meta tensors: counted, no GPU ran anything. What counts:"
        " `scripts/benchmarks/launches.py`.",
        "",
        f"The budget is {FORWARD} launches forward and {BACKWARD} backward a block, whatever the"
        f" length, but for chunks of fixed bytes ({CHUNK} launches each).",
        "",
    ]


def _table(passes: Sequence[tuple[int, BlockLaunches]]) -> list[str]:
    rows = [("block", "tokens", "forward", "backward")]
    rows += [
        (p.name, f"{tokens:,}", str(sum(p.forward.values())), str(sum(p.backward.values())))
        for tokens, p in passes
    ]
    return _lines(rows)


def _operations(one: BlockLaunches) -> list[str]:
    """Each operator, and each aten operation outside them, with its counts."""
    rows: list[tuple[str, ...]] = [(f"operator ({one.name})", "kernel", "forward", "backward")]
    for inside, kernel in sorted(one.forward.keys() | one.backward.keys()):
        counts = (str(side[inside, kernel] or "") for side in (one.forward, one.backward))
        rows.append((inside, kernel, *counts))
    return _lines(rows)


def plain_chunk(config: ModelConfig, layer: int) -> dict[str, int]:
    """Launches that 256 more tokens cost a block of the plain path, by its loops over chunks.

    Args:
        config: the model; its kernels are not asked.
        layer: number of the block.
    """
    config = replace(config, kernels=Kernels.torch)
    more: Counter[str] = Counter()
    last = 10 if config.ratio(layer) == 4 else 3  # more entries than the indexer chooses
    for chunks, sign in ((last, 1), (last - 1, -1)):
        one = block_pass(config, layer, chunks * 256, within="kernels/attention_fast.py")
        for side in (one.forward, one.backward):
            for (function, _), count in side.items():
                more[function] += sign * count
    return {name: count for name, count in more.items() if count}


def _plain(name: str) -> list[str]:
    config = load_model_config(name)
    rows: list[tuple[str, ...]] = [(f"block of {name}", "loop", "launches, a chunk of 256")]
    for kind, layer in kinds(config).items():
        for loop, launches in sorted(plain_chunk(config, layer).items()):
            rows.append((kind, loop, str(launches)))
    return _lines(rows)


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["v4_small", "v4_flash"])
    parser.add_argument(
        "--tokens", nargs="+", type=whole(least=1), default=[4096, 16384], help="of a row"
    )
    parser.add_argument("--no-plain", action="store_true", help="leave the plain path out")
    parser.add_argument("--markdown", default="", help="also write it as a document")
    return parser.parse_args(words)
