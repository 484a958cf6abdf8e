"""What ``v4 bench scoring`` makes of the ranks' seconds; the counted gain is the plan's."""

import json
from pathlib import Path

import pytest

from scripts.layout_trials import scoring


def planted(seconds):
    """As if the ranks had run: (order, rank) -> CPU seconds of the rounds."""

    def spawn(fn, given, nprocs):
        assert fn is scoring.on_rank
        for rank in range(nprocs):
            mine = {order: seconds[order, rank] for order in ("own", "balanced")}
            Path(given[-1], f"{rank}.json").write_text(json.dumps(mine))

    return spawn


def test_gain_is_the_costliest_ranks_and_counted_is_the_work_of_the_plan(
    monkeypatch, tmp_path, capsys
):
    """One document in two shards: 3/4 of the work is the last one's, half of it when shared."""
    seconds = {
        ("own", 0): [1.0, 9.0, 0.8], ("own", 1): [3.0, 2.0, 9.0],
        ("balanced", 0): [2.0, 2.0, 2.0], ("balanced", 1): [2.5, 1.0, 9.0],
    }  # fmt: skip
    monkeypatch.setattr(scoring.mp, "spawn", planted(seconds))
    file = tmp_path / "found.json"
    assert scoring.main(["--tokens", "1024", "--rounds", "3", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["cpu_seconds"] == {"own": [1.0, 3.0], "balanced": [2.0, 2.5]}
    assert found["gain"] == pytest.approx(3 / 2.5)
    assert found["costliest_over_cheapest"] == {"own": 3.0, "balanced": 1.25}
    assert found["counted"] == pytest.approx(1.5, rel=0.02)
    assert "gain 1.20 of the costliest rank, counted 1.50" in capsys.readouterr().out


def test_short_documents_have_nothing_to_share(monkeypatch, tmp_path):
    seconds = {(order, rank): [1.0] for order in ("own", "balanced") for rank in range(2)}
    monkeypatch.setattr(scoring.mp, "spawn", planted(seconds))
    words = ["--tokens", "1024", "--document", "256", "--json", str(tmp_path / "f.json")]
    assert scoring.main(words) == 0
    assert json.loads((tmp_path / "f.json").read_text())["counted"] == 1.0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "1022", "--cp", "2"], "--tokens 1022 must be a multiple of 2 * --cp=4"),
        (["--cp", "1"], "--cp 1 must be at least 2"),
    ],
)
def test_what_cannot_be_shared_is_one_line(words, says, capsys):
    assert scoring.main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_ranks_measure_both_orders(capsys):
    assert scoring.main(["--tokens", "256", "--rounds", "1"]) == 0
    assert "balanced" in capsys.readouterr().out
