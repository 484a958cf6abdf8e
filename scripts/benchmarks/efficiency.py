"""Parameters, KV cache and FLOPs per decoded token of V4-Flash and V4-Pro (reference F).

Beside DeepSeek-V3.2 and a bf16 cache of 8 KV heads (GQA8), from 4K to 1M tokens of context, from
the configurations alone. FLOPs are given raw and FP8-equivalent: core attention in bf16 counts
twice, V4's indexer in FP4 a half, everything else once. That weighting is inferred; it reproduces
the paper's figure 1 at a million tokens. At 128K the ratios are far less striking: see the table.

    python scripts/bench.py efficiency
    python scripts/bench.py efficiency --models v4_pro my_model.yaml --out /tmp/efficiency
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.config import ModelConfig
from model.decoding_costs import (
    DecodingFlops,
    decoding_flops,
    gqa8_kv_cache_bytes,
    kv_cache_bytes,
    v32_decoding_flops,
    v32_kv_cache_bytes,
)
from model.flops import training_flops
from model.parameter_counts import parameter_counts
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import PNG, check_output, write_json
from scripts.cli.parser import CommandParser, whole

CONTEXTS = (4096, 16384, 65536, 131072, 262144, 524288, 1000000)
Figures = dict[str, Any]


def model_report(config: ModelConfig, contexts: list[int]) -> Figures:
    """Everything about one model; ratios are fractions."""
    counts = parameter_counts(config)
    rows = []
    for context in contexts:
        cache, flops = kv_cache_bytes(config, context), decoding_flops(config, context)
        v32 = v32_decoding_flops(context)
        rows.append(
            {
                "context": context,
                "kv_bytes": cache,
                "kv_of_v32": cache / v32_kv_cache_bytes(context),
                "kv_of_gqa8": cache / gqa8_kv_cache_bytes(config.num_hidden_layers, context),
                "flops": flops_report(flops),
                "raw_of_v32": flops.raw / v32.raw,
                "fp8_of_v32": flops.fp8_equivalent / v32.fp8_equivalent,
                "training_flops": training_flops(config, context).total,
            }
        )
    return {
        "parameters": {
            "total": counts.total,
            "without_mtp": counts.main,
            "active": counts.active,
            "active_without_embedding": counts.active_without_embedding,
            "by_kind": counts.by_kind,
        },
        "contexts": rows,
    }


def flops_report(flops: DecodingFlops) -> dict[str, float]:
    """FLOPs per decoded token by part."""
    return {
        "gemm": flops.gemm,
        "core": flops.core,
        "index": flops.index,
        "raw": flops.raw,
        "fp8_equivalent": flops.fp8_equivalent,
    }


def reference_report(contexts: list[int]) -> list[Figures]:
    """DeepSeek-V3.2 at the same contexts."""
    return [
        {
            "context": context,
            "kv_bytes": v32_kv_cache_bytes(context),
            "flops": flops_report(v32_decoding_flops(context)),
        }
        for context in contexts
    ]


def print_report(models: dict[str, Figures], v32: list[Figures]) -> None:
    """One block of parameters, one table of contexts a model."""
    print("Parameters          total              without MTP        active   w/o embedding")
    for name, report in models.items():
        p = report["parameters"]
        print(
            f"  {name:<14}{p['total']:>19,}{p['without_mtp']:>21,}"
            f"{p['active'] / 1e9:>9.3f} B{p['active_without_embedding'] / 1e9:>11.3f} B"
        )
    for name, report in models.items():
        print(f"\n{name}: per sequence (KV cache) and per token (FLOPs)")
        print(
            "   context    KV cache  of V3.2  of GQA8 |  decoding raw  of V3.2 |"
            "  FP8-equiv.  of V3.2 |  training"
        )
        for row in report["contexts"]:
            flops = row["flops"]
            print(
                f"{row['context']:>10,}{row['kv_bytes'] / 1e9:>9.3f} GB{row['kv_of_v32']:>8.1%}"
                f"{row['kv_of_gqa8']:>9.2%} |{flops['raw'] / 1e9:>12.1f} G{row['raw_of_v32']:>9.1%}"
                f" |{flops['fp8_equivalent'] / 1e9:>10.1f} G{row['fp8_of_v32']:>9.1%}"
                f" |{row['training_flops'] / 1e9:>8.1f} G"
            )
    print("\nDeepSeek-V3.2")
    for row in v32:
        flops = row["flops"]
        print(
            f"{row['context']:>10,}{row['kv_bytes'] / 1e9:>9.3f} GB{'':>17} |"
            f"{flops['raw'] / 1e9:>12.1f} G{'':>9} |{flops['fp8_equivalent'] / 1e9:>10.1f} G"
        )


def draw(models: dict[str, Figures], v32: list[Figures], path: Path) -> None:
    """KV cache, raw and FP8-equivalent FLOPs over the context length."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    cache, raw, fp8 = figure.subplots(1, 3)
    series = {"V3.2": v32} | {name: report["contexts"] for name, report in models.items()}
    for name, rows in series.items():
        contexts = [row["context"] for row in rows]
        cache.plot(contexts, [row["kv_bytes"] / 1e9 for row in rows], marker="o", label=name)
        for axes, field in ((raw, "raw"), (fp8, "fp8_equivalent")):
            axes.plot(contexts, [row["flops"][field] / 1e9 for row in rows], marker="o", label=name)
    for name, report in models.items():
        rows = report["contexts"]
        gqa8 = [row["kv_bytes"] / row["kv_of_gqa8"] / 1e9 for row in rows]
        cache.plot([row["context"] for row in rows], gqa8, "--", label=f"GQA8, layers of {name}")
    finish_axes(cache, "KV cache of one sequence (GB)")
    finish_axes(raw, "FLOPs per decoded token, raw (G)")
    finish_axes(fp8, "FLOPs per decoded token, FP8-equivalent (G)")
    figure.savefig(path, dpi=110)


def finish_axes(axes: Axes, title: str) -> None:
    """Logarithmic in both directions, with a legend."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context (tokens)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Parse, compute, print, write."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["v4_flash", "v4_pro"], help="names in conf/model, or YAMLs"
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=whole(least=1),
        default=list(CONTEXTS),
        help="context lengths, tokens",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of JSON and PNG")
    args = parser.parse_args(words)
    table, picture = args.out / "efficiency.json", args.out / "efficiency.png"
    check_output("--out", table, '"deepseek_v3_2"')
    check_output("--out", picture, PNG)
    models = {n: model_report(load_model_config(n), args.contexts) for n in args.models}
    v32 = reference_report(args.contexts)
    print_report(models, v32)
    write_json(table, {"models": models, "deepseek_v3_2": v32})
    draw(models, v32, picture)
    print(f"\nwritten: {table}, {picture}")
