"""One step of a large layout's ranks on fake tensors: every exchange, and the bytes held at once.

    python scripts/bench.py fake_step v4_flash        # its last stage: 1M tokens, cp 64, 512 ranks
    python scripts/bench.py fake_step v4_flash v4_pro --markdown FILE --json FILE
    python scripts/bench.py fake_step v4_tiny --parallel single --set parallel.cp=2

One process builds what a rank builds (:mod:`scripts.layout_trials.fake_ranks`) and runs a whole
step of its engine: the pipeline's schedule with all microbatches, FSDP's hooks, recomputation, the
update. Tensors have shapes and no values, the process group only pretends, kernels are those of a
GPU. What a value would decide is decided so: tokens spread evenly over experts, and rows are one
document. Ranks of a pipeline stage do alike but for Muon's matrices, which few own; the one that is
run has neighbours on both sides.

Beside each exchange stands its closed form (:mod:`scripts.layout_trials.exchanges`). Exit codes:
0 all as the closed forms say, 1 not, 2 input that cannot be.
"""

# Legend: P ranks of a group, L experts of a rank, N tokens, K experts a token
from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

import model.transformer as transformer
from data.batch import Batch
from model.config import Kernels, ModelConfig
from model.context import ForwardContext, build_context
from model.loss import Objective
from model.moe.dispatch import Dispatched
from model.parameter_counts import parameter_shapes
from optim.build import build_optimizer
from optim.config import MatmulDtype
from parallel.distributed import DistributedEngine
from parallel.expert import AllToAllDispatcher
from parallel.mesh import build_mesh, check_layout
from parallel.pipeline_engine import PipelineEngine
from parallel.pipeline_stage import ModelPart
from parallel.sharded_model import build_sharded_model
from quant.apply import reads_master
from scripts.cli.command import command
from scripts.cli.outputs import check_output, write_json, write_text
from scripts.cli.parser import CommandParser, whole
from scripts.layout_trials.exchange_forms import Expected, expected
from scripts.layout_trials.exchanges import ExchangeWatch, Key
from train.config.command_line import compose_run
from train.config.schema import Precision, RunConfig
from train.errors import UserError
from train.preflight.needs import Needs
from train.stages import Stage, resolve
from train.step import loss_weights

CARD = 80e9  # bytes
CPU = torch.device("cpu")


class EvenDispatcher(AllToAllDispatcher):
    """Every expert is sent as many tokens: fake counts cannot be read."""

    def dispatch(
        self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, num_experts: int
    ) -> Dispatched:
        """As in the base class."""
        self._even = [index_NK.numel() // self._ranks] * self._ranks
        return super().dispatch(x_ND, index_NK, weight_NK, num_experts)

    def splits(self, count_PL: Tensor, received_PL: Tensor) -> tuple[list[int], list[int]]:
        """Of all copies as many to every rank."""
        return self._even, self._even


# ---- one rank ------------------------------------------------------------------------------------
def run_rank(
    run: RunConfig, stage: Stage, rank: int, microbatches: int = 0
) -> tuple[ExchangeWatch, dict[Key, Expected]]:
    """Run one step of one rank.

    Args:
        run: resolved degrees; its model's kernels those of a GPU.
        stage: of training.
        rank: which.
        microbatches: of the step; 0: what the batch gives this rank.

    Returns:
        What was seen, and what the closed forms say.
    """
    layout, config = run.parallel, run.model
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        mesh = build_mesh(layout, "cpu", cps=[stage.cp])
        model = build_sharded_model(
            config, mesh, torch.device("meta"), run.train.precision.value,
            run.train.activation_checkpoint.value, run.seed, None,
            partial(reads_master, run.quant), stage.seq_len,
        )  # fmt: skip
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:  # FSDP takes no parameters on the meta device
            for part in model.stages if isinstance(model, ModelPart) else [model]:
                part.to_empty(device=CPU)
        for module in model.modules():
            dispatcher = getattr(module, "dispatcher", None)
            if isinstance(dispatcher, AllToAllDispatcher):
                dispatcher.__class__ = EvenDispatcher
        optimizer = build_optimizer(
            model.named_parameters(), run.optim, split_counts=config.split_counts,
            group=mesh.data.get_group(), shapes=parameter_shapes(config),
        )  # fmt: skip
        bf16 = run.train.precision is Precision.bf16
        model.compute_dtype = torch.bfloat16 if bf16 else torch.float32
        clip = run.optim.grad_clip
        if isinstance(model, ModelPart):
            engine = PipelineEngine(model, optimizer, CPU, clip, mesh)
        else:
            engine = DistributedEngine(model, optimizer, CPU, clip, mesh)
        engine.gather = lambda value: [value]  # no process is there to tell
        engine.cut_rows(stage.cp)
        count = microbatches or count_of(stage, layout.data_degree)
        watch = ExchangeWatch(model, optimizer)
        with fake, planned_on_host(fake, stage), watch:
            depths = 1 + config.num_nextn_predict_layers
            rows = stage.micro_batch_size
            batch = Batch(
                torch.zeros(rows, stage.seq_len, dtype=torch.int64),
                torch.zeros(rows, stage.seq_len, dtype=torch.int64),
                torch.zeros(rows, stage.seq_len, depths, dtype=torch.int64),
            )
            weights = loss_weights(stage, run.train, False)
            objective = Objective(
                (1.0,) * depths, 1.0, weights.mtp, weights.indexer, weights.balance,
                stage.indexer_phase,
            )  # fmt: skip
            engine.forward_backward([batch] * count, objective)
            engine.optimizer_step(1e-3, finite=True)
        return watch, expected(run, stage, model, mesh, count)
    finally:
        dist.destroy_process_group()


def as_on_cards(run: RunConfig, ranks: int) -> RunConfig:
    """The same on so many ranks, with what GPUs compute by: kernels, and Muon's matmuls in bf16."""
    return replace(
        run, parallel=run.parallel.resolve(ranks),
        model=replace(run.model, kernels=Kernels.triton),
        optim=replace(run.optim, muon=replace(run.optim.muon, dtype=MatmulDtype.bf16)),
    )  # fmt: skip


def count_of(stage: Stage, data_degree: int) -> int:
    """Microbatches of a step on a data rank."""
    rows = stage.global_batch_tokens // stage.seq_len
    return rows // (data_degree // stage.cp) // stage.micro_batch_size


@contextmanager
def planned_on_host(fake: FakeTensorMode, stage: Stage) -> Iterator[None]:
    """Plans are built of real ids, on the host, as always; then they are fake too."""
    documents_BT = torch.zeros(stage.micro_batch_size, stage.seq_len, dtype=torch.int64)
    known: dict[Any, ForwardContext] = {}

    def build(config: Any, _: Tensor, yarn: bool, device: torch.device, kv_exchange: Any) -> Any:
        if kv_exchange not in known:
            with unset_fake_temporarily():
                known[kv_exchange] = build_context(config, documents_BT, yarn, device, kv_exchange)
            known[kv_exchange] = _faked(known[kv_exchange], fake)
        return replace(known[kv_exchange])

    with mock.patch.object(transformer, "build_context", build):
        yield


def _faked(value: Any, fake: FakeTensorMode) -> Any:
    """Tensors made fake, in what holds them; bounds stay numbers of the host."""
    if isinstance(value, Tensor):
        return fake.from_tensor(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_faked(v, fake) for v in value))
    if isinstance(value, tuple):
        return tuple(_faked(v, fake) for v in value)
    if isinstance(value, dict):
        return {k: _faked(v, fake) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        kept = ("bounds", "kv_exchange")
        return replace(value, **{k: v if k in kept else _faked(v, fake) for k, v in parts.items()})
    return value


# ---- the command ---------------------------------------------------------------------------------
@command()
def main(words: Sequence[str] | None = None) -> int:
    """Run, compare, print, write; the exit code."""
    args = options().parse_args(words)
    if args.markdown:
        check_output("--markdown", Path(args.markdown), "scripts/bench.py fake_step")
    if args.json:
        check_output("--json", Path(args.json), '"exchanges"')
    found = [one_model(name, args) for name in args.models]
    shown = " ".join(words if words is not None else sys.argv[1:])
    lines = [
        "# A step of a large layout, on fake tensors", "",
        f"Made by `python scripts/bench.py fake_step {shown}` on {time.strftime('%Y-%m-%d')}, torch"
        f" {torch.__version__}: the real wrapped model and engine, no values, no other ranks.", "",
        "Bytes of an exchange are those of its whole operand on a rank: what an all-gather or an"
        " all-to-all gives, what a reduce-scatter takes. `closed form` is computed from the config"
        " alone (`scripts/layout_trials/exchange_forms.py`); of Muon it holds for this very rank,"
        " since ranks own few matrices, and not alike; `-`: some numbers, without a form. Not"
        " traced: the casts of quantisation, the audit's copies, the runtime; the fit table counts"
        " the latter two.", "",
    ]  # fmt: skip
    for one in found:
        lines += one["lines"]
    print("\n".join(lines))
    if args.markdown:
        write_text(Path(args.markdown), "\n".join(lines) + "\n")
    if args.json:
        write_json(
            Path(args.json), [{k: v for k, v in one.items() if k != "lines"} for one in found]
        )
    return int(any(one["off"] for one in found))


def one_model(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every pipeline rank of a model's preset."""
    run = compose_run([f"model={name}", f"parallel={args.parallel or name}", *args.set])
    degrees = run.parallel
    ranks = degrees.pp * degrees.dp_replicate * degrees.dp_shard * degrees.cp
    if ranks < 2:
        raise UserError(f"parallel.dp_shard={degrees.dp_shard}: give a number of ranks above 1")
    for key, value, wanted in (
        ("train.activation_checkpoint", run.train.activation_checkpoint.value, "block"),
        ("parallel.dp_replicate", degrees.dp_replicate, 1),
        ("parallel.cp_scoring", degrees.cp_scoring.value, "own"),
    ):
        if value != wanted:
            raise UserError(f"the closed forms of fake_step hold for {key}={wanted}, not {value}")
    run = as_on_cards(run, ranks)
    layout = run.parallel
    check_layout(layout, run.model)
    plan = resolve(run)
    stage = plan.stages[-1]
    fit = Needs(run, plan)
    whole = count_of(stage, layout.data_degree)
    count = args.microbatches or whole
    ran = replace(stage, global_batch_tokens=stage.global_batch_tokens // whole * count)
    ranks_of = [p * layout.data_degree + min(1, stage.cp - 1) for p in range(layout.pp)]
    results, began = [], time.perf_counter()
    for part in args.parts or range(layout.pp):
        watch, closed = run_rank(run, stage, ranks_of[part], args.microbatches)
        table = [fit._rank(one, layout, "cuda", part).total for one in (ran, stage)]
        results.append(rank_result(ranks_of[part], watch, closed, table, run.model))
        took = time.perf_counter() - began
        print(f"{name}: rank {ranks_of[part]}, {took:.0f} s", file=sys.stderr, flush=True)
    off = sum(differs(row) for one in results for row in one["exchanges"])
    out = {
        "model": name, "ranks": ranks, "layout": str(layout), "stage": stage.name,
        "seq_len": stage.seq_len, "cp": stage.cp, "microbatches": count,
        "of": whole, "off": off, "results": results,
    }  # fmt: skip
    return out | {"lines": document(out)}


def rank_result(
    rank: int,
    watch: ExchangeWatch,
    closed: dict[Key, Expected],
    fit: list[int],
    config: ModelConfig,
) -> dict[str, Any]:
    """Numbers of one rank."""
    rows = []
    for key in sorted(watch.seen.keys() | closed.keys(), key=_order):
        seen, formula = watch.seen[key], closed.get(key, Expected())
        rows.append(
            {
                "layer": key.layer, "kind": kind_of(key.layer, config), "what": key.what,
                "count": seen.count, "bytes": seen.bytes,
                "closed_count": formula.count, "closed": formula.bytes, "exact": formula.exact,
            }
        )  # fmt: skip
    memory = watch.memory()
    return {
        "rank": rank, "memory": memory, "fit": fit[0], "fit_of_whole_step": fit[1],
        "whole_step": memory["total"] + fit[1] - fit[0], "exchanges": rows,
    }  # fmt: skip


def differs(row: dict[str, Any]) -> bool:
    """Whether a formula is not what was seen."""
    return row["exact"] and (row["bytes"], row["count"]) != (row["closed"], row["closed_count"])


def _order(key: Key) -> tuple[Any, ...]:
    layer, what = key
    name, _, number = layer.partition(".")
    return name, int(number) if number.isdigit() else -1, what


def document(out: dict[str, Any]) -> list[str]:
    """What was found, as Markdown."""
    GB = 1e9
    part = "" if out["microbatches"] == out["of"] else f" (of {out['of']} of a whole step)"
    lines = [
        f"## {out['model']} on {out['ranks']} ranks: {out['layout']}, stage {out['stage']}", "",
        f"Rows of {out['seq_len']:,} tokens, cp {out['cp']}; a step of {out['microbatches']}"
        f" microbatches{part}.", "",
        "### Bytes of a rank at its peak, GB", "",
    ]  # fmt: skip
    kinds = list(out["results"][0]["memory"])
    ends = ["fit table"]
    if out["microbatches"] != out["of"]:
        ends += ["with all microbatches", "fit table, all"]
        lines += [
            "`with all microbatches` adds what the fit table (`train/preflight/fit.py`) adds for"
            " those in flight then.", "",
        ]  # fmt: skip
    table = [["rank", *kinds, *ends]]
    for one in out["results"]:
        numbers = [*one["memory"].values(), one["fit"], one["whole_step"], one["fit_of_whole_step"]]
        cells = [f"{number / GB:.2f}" for number in numbers]
        table.append([str(one["rank"]), *cells[: len(kinds) + len(ends)]])
    lines += [*_markdown(table), ""]
    full = max(out["results"], key=lambda one: one["whole_step"])
    lines += [verdict(full), "", "### Exchanges of a layer and a step", ""]
    table = [["layer", "exchange", "layers on all pipeline ranks", "exchanges a step of a layer",
              "bytes a step of a layer", "closed form"]]  # fmt: skip
    groups: dict[tuple[Any, ...], list[str]] = {}
    for one in out["results"]:
        for row in one["exchanges"]:
            if row["bytes"] or row["closed"]:
                closed = f"{row['closed']:,}" if row["exact"] else "-"
                closed += " OFF" if differs(row) else ""
                key = (row["kind"], row["what"], row["count"], row["bytes"], closed)
                groups.setdefault(key, []).append(row["layer"])
    for (kind, what, count, size, closed), layers in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1], -item[0][3])
    ):
        table.append([kind, what, str(len(layers)), f"{count:,}", f"{size:,}", closed])
    lines += [*_markdown(table), "", "### A step of a rank, GB", ""]
    whats = sorted({_short(row["what"]) for one in out["results"] for row in one["exchanges"]})
    table = [["rank", *whats, "all"]]
    for one in out["results"]:
        sums: Counter[str] = Counter()
        for row in one["exchanges"]:
            sums[_short(row["what"])] += row["bytes"]
        table.append([str(one["rank"]), *(f"{sums[w] / GB:.3f}" for w in whats),
                      f"{sum(sums.values()) / GB:.2f}"])  # fmt: skip
    return [*lines, *_markdown(table), ""]


def _short(what: str) -> str:
    """``tokens before, 7 x 512, back`` without its numbers and its way."""
    return what.partition(",")[0].partition(" of ")[0]


def kind_of(layer: str, config: ModelConfig) -> str:
    """``layers.3`` as the kinds of its attention and router; what is no layer as it is."""
    name, _, number = layer.partition(".")
    if name != "layers":
        return layer
    return f"{config.kind(int(number)).value}, {config.router(int(number)).value}"


def verdict(full: dict[str, Any]) -> str:
    """Whether the fullest rank fits, and which terms are too much where not."""
    total, left = full["whole_step"], (CARD - full["whole_step"]) / 1e9
    if left >= 0:
        return f"The fullest rank, {full['rank']}, fits a card of 80 GB with {left:.1f} GB left."
    terms = sorted(((v, k) for k, v in full["memory"].items() if k != "total"), reverse=True)
    named = ", ".join(f"{k} {v / 1e9:.1f}" for v, k in terms[:3])
    return (
        f"The fullest rank, {full['rank']}, needs {total / 1e9:.1f} GB, {-left:.1f} more than a"
        f" card of 80 GB has. Its largest terms: {named} GB."
    )


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="of conf/model")
    parser.add_argument("--parallel", help="of conf/parallel (default: named as the model)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other config")
    parser.add_argument(
        "--parts", nargs="+", type=whole(least=0), help="pipeline ranks (default: all)"
    )
    parser.add_argument(
        "--microbatches", type=whole(least=0), default=0, help="of the step; 0: those of the batch"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write a document")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found")
    return parser
