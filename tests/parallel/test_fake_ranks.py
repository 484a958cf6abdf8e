"""Large layouts are built by one process: placements, and bytes per rank against the fit table.

Bound: 1 % of the weights and optimizer states of ``train/preflight/needs.py``, which counts shards
as even.
"""

import csv

import pytest

from scripts.layout_trials.fake_ranks import build_rank, main
from tests.helpers import ROOT
from train.config.command_line import compose_run

SMALL = ["v4_small", "--parallel", "single", "--set", "parallel.dp_shard=4", "parallel.ep=2"]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_small_layout_agrees_with_the_fit_table_and_lists_every_placement(tmp_path, capsys):
    placements = tmp_path / "placements.csv"
    assert main([*SMALL, "parallel.pp=2", "--csv", str(placements)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "v4_small on 8 ranks, dp_shard=4 ep=2 pp=2" in printed
    rows = rows_of(placements)
    assert {row["rank"] for row in rows} == {"0", "4"}
    assert len({(row["rank"], row["name"]) for row in rows}) == len(rows)
    experts = [r for r in rows if ".experts." in r["name"] and r["kind"] == "parameter"]
    assert all("ep=" in row["placement"] for row in experts)
    assert all("Shard" in r["placement"] or "S(" in r["placement"] for r in experts)


def test_what_is_whole_on_every_rank_is_found(capsys):
    """Replicas hold everything whole: just what the check is there to see."""
    args = ["v4_small", "--parallel", "single", "--set", "parallel.dp_replicate=2"]
    assert main([*args, "parallel.dp_shard=1"]) == 1
    assert "whole on every rank: embed.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "degrees",
    [
        ["parallel.dp_replicate=2", "parallel.dp_shard=2"],
        ["parallel.dp_shard=4", "parallel.ep=2"],
        ["parallel.dp_replicate=2", "parallel.dp_shard=2", "parallel.ep=4"],
    ],
    ids=["hsdp", "ep", "hsdp-ep"],
)
def test_newton_schulz_is_done_once_for_every_matrix_and_shared_evenly(degrees):
    """Every rank plans alike, so one rank's plan tells what all do; replicas repeat nothing."""
    run = compose_run(["model=v4_tiny", *degrees])
    parts = [build_rank(run, rank, 4) for rank in (0, 3)]
    assert [part.unowned for part in parts] == [[], []]
    assert parts[0].work == parts[1].work < 1.5


@pytest.mark.core
def test_layout_that_cannot_be_leaves_with_2(capsys):
    assert main([*SMALL[:-1], "parallel.ep=3"]) == 2
    assert "parallel.ep=3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("model", "ranks"), [("v4_flash", 512), ("v4_pro", 2048)])
def test_preset_of_a_large_model_fits_as_the_table_says(model, ranks, tmp_path, capsys):
    assert main([model, "--csv", str(tmp_path / "placements.csv")]) == 0, capsys.readouterr().out
    assert f"{model} on {ranks} ranks" in capsys.readouterr().out
    assert ROOT.joinpath("conf", "parallel", f"{model}.yaml").is_file()
