"""Parameters and training FLOPs per token of a model's ablation twins, side by side.

A twin differs from the model in one switch: attention (csa, hca, swa, dense), residual (plain),
routers (all hash, all learned), MTP (off), indexer loss (off). A twin is fair when it costs about
the same: the table gives every twin's cost over the model's, and how many more tokens it could
train on for the same FLOPs.

    python scripts/twins.py
    python scripts/twins.py v4_mini --seq-len 4096 --json twins.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.config import Attention, ModelConfig, Residual, Router
from model.flops import training_flops
from model.parameter_counts import parameter_counts
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole


@dataclass(frozen=True)
class Twin:
    """One line of the table.

    Attributes:
        name: the switch and its value.
        parameters: of everything, MTP included.
        active: what one token uses in the main model.
        forward: FLOPs per token.
        total: FLOPs per token, forward and backward.
        by_part: the same by part.
        of_model: total over the model's own, a fraction.
    """

    name: str
    parameters: int
    active: int
    forward: float
    total: float
    by_part: dict[str, float]
    of_model: float = 1.0


def variants(config: ModelConfig) -> Iterator[tuple[str, ModelConfig, bool]]:
    """Name, configuration and whether the indexer's loss is on; the model itself comes first."""
    layers = config.num_hidden_layers
    yield "as configured", config, True
    for attention in Attention:
        if attention is not config.attention:
            yield f"attention={attention}", replace(config, attention=attention), True
    for residual in Residual:
        if residual is not config.residual:
            yield f"residual={residual}", replace(config, residual=residual), True
    for router in Router:
        yield f"routers={router}", replace(config, routers=[router] * layers), True
    if config.num_nextn_predict_layers:
        ratios = config.compress_ratios[:layers]
        without = replace(config, num_nextn_predict_layers=0, compress_ratios=ratios)
        yield "mtp off", without, True
    yield "indexer loss off", config, False


def compare(config: ModelConfig, seq_len: int, phase: str) -> list[Twin]:
    """Every twin of a model; the first line is the model itself."""
    twins: list[Twin] = []
    for name, variant, indexer_loss in variants(config):
        counts = parameter_counts(variant)
        # A warm-up without the indexer's loss trains nothing: there the full phase is the twin.
        used = "full" if phase == "warmup" and not indexer_loss else phase
        flops = training_flops(variant, seq_len, used, indexer_loss)
        ratio = flops.total / twins[0].total if twins else 1.0
        forward = sum(flops.forward.values())
        twins.append(
            Twin(name, counts.total, counts.active, forward, flops.total, flops.by_part, ratio)
        )
    return twins


def print_table(title: str, twins: list[Twin]) -> None:
    """Totals first, then the parts that any twin has."""
    print(title)
    print(
        f"{'twin':<20}{'parameters':>20}{'active':>17}{'forward':>12}{'fwd+bwd':>12}"
        f"{'of model':>10}{'tokens':>9}"
    )
    for twin in twins:
        print(
            f"{twin.name:<20}{twin.parameters:>20,}{twin.active:>17,}{twin.forward / 1e6:>12,.2f}"
            f"{twin.total / 1e6:>12,.2f}{twin.of_model:>10.3f}{1 / twin.of_model:>9.3f}"
        )
    parts = sorted({part for twin in twins for part in twin.by_part})
    print(f"\n{'by part':<20}" + "".join(f"{part:>12}" for part in parts))
    for twin in twins:
        costs = "".join(f"{twin.by_part.get(part, 0.0) / 1e6:>12,.2f}" for part in parts)
        print(f"{twin.name:<20}{costs}")
    print("\nFLOPs in millions per token; tokens: how many for one of the model's, at equal FLOPs")


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Parse, compute, print."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="v4_nano", help="name in conf/model, or a YAML")
    parser.add_argument("overrides", nargs="*", help="key=value of the model, e.g. index_topk=64")
    parser.add_argument("--seq-len", type=whole(least=1), default=4096, help="tokens of a row")
    parser.add_argument("--phase", choices=("full", "warmup", "sparse"), default="sparse")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args(words)
    if args.json:
        check_output("--json", args.json, '"twins"')
    config = load_model_config(args.model, args.overrides)
    twins = compare(config, args.seq_len, args.phase)
    print_table(f"{config.name}, rows of {args.seq_len} tokens, indexer phase {args.phase}", twins)
    if args.json:
        rows = [asdict(twin) for twin in twins]
        document = {"model": config.name, "seq_len": args.seq_len, "phase": args.phase}
        write_json(args.json, document | {"twins": rows})


if __name__ == "__main__":
    sys.exit(main())
