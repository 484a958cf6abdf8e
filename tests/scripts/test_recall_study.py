"""The retrieval study: what it would train is what a run accepts; verdicts need several seeds."""

import json

import pytest

from scripts.benchmarks import recall
from scripts.benchmarks.recall import ARMS, CLAIMS, RATES, Model, gather, judged, main, report
from train.config.command_line import compose_run


def run(far, near=1.0):
    cells = [
        {"length": 128, "depth": 0.0, "beyond": True, "count": 48, "correct": far},
        {"length": 128, "depth": 1.0, "beyond": False, "count": 16, "correct": near},
    ]
    return {"cells": cells, "answers": []}


def runs(**arms):
    return {
        f"{name.replace('_', ' ')} {seed}": run(far)
        for name, values in arms.items() for seed, far in enumerate(values)
    }  # fmt: skip


@pytest.mark.parametrize("task", RATES)
@pytest.mark.parametrize("arm", ARMS)
def test_every_part_is_a_run(task, arm, tmp_path):
    first, second, probe = Model(task, arm, 2).commands(tmp_path)
    one, two = (compose_run(words[1:]) for words in (first, second))
    for made in (one, two):
        assert (made.seed, str(made.model.attention)) == (2, arm)
        assert [str(t) for t in made.data.sources["pairs"].tasks] == [task]
    assert str(two.init_from) == str(one.run_dir)
    assert bool(two.train.stages) is (arm in recall.WITH_INDEXER)
    assert probe[1] == str(two.run_dir)


def test_a_difference_in_every_seed_is_a_verdict_and_one_seed_is_none():
    found = judged(runs(pairs_csa=[0.99, 0.98, 1.0], pairs_hca=[0.03, 0.05, 0.02]))
    assert set(found) == {"CSA finds where HCA does not"}
    assert found["CSA finds where HCA does not"][1] < 0.05
    assert judged(runs(pairs_csa=[0.99], pairs_hca=[0.03])) == {}
    text = report(runs(pairs_csa=[0.3, 0.9, 0.5], pairs_hca=[0.4, 0.2, 0.6]))
    assert "no verdict" in text
    other = report(runs(pairs_csa=[0.03, 0.05, 0.02], pairs_hca=[0.99, 0.98, 1.0]))
    assert "no, the other way round" in other


def test_claims_share_their_error():
    """The p value of one claim is multiplied by the number of those that are tested."""
    alone = judged(runs(gist_hca=[0.9, 0.8, 0.7], gist_swa=[0.5, 0.5, 0.5]))
    more = runs(gist_hca=[0.9, 0.8, 0.7], gist_swa=[0.5] * 3, gist_csa=[0.1, 0.9, 0.8])
    name = "HCA gives the gist where windows do not"
    assert judged(more)[name][1] == pytest.approx(2 * alone[name][1])
    assert {arm for _, *pair in CLAIMS.values() for arm in pair} == set(ARMS)


def test_models_that_are_there_are_gathered_and_reported(tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / "runs" / "probes" / f"gist_hca_{seed}"
        folder.mkdir(parents=True)
        cell = run(0.5)["cells"][0] | {"task": "gist", "nats": 1.0}
        near = run(0.5)["cells"][1] | {"task": "gist", "nats": 1.0}
        told = {"models": {"any": {"needles": [cell, near]}}}
        (folder / "probe.json").write_text(json.dumps(told))
    (tmp_path / "runs" / "probes" / "gist_hca_1.old").mkdir()
    found = gather(tmp_path / "runs")
    assert set(found) == {"gist hca 0", "gist hca 1"}
    words = ["--tasks", "gist", "--arms", "hca", "--seeds", "0", "1"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main([*words, *places]) == 0  # nothing is missing: nothing is trained
    table = capsys.readouterr().out
    assert "2 models, 2 are there" in table
    assert "| gist | hca | 8e-3 | 1.000 | 0.500 | 0.500, 0.500 |" in table
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"recall.json", "gist.png"}
    assert main(["--report-only", *places]) == 0
    assert capsys.readouterr().out in table
    assert main(["--report-only", "--out", str(tmp_path / "none")]) == 2


def test_the_page_says_what_its_figures_say():
    runs = recall.read(recall.PAGE / "recall.json")
    assert set(runs) == {
        f"{task} {arm} {seed}" for task in RATES for arm in ARMS for seed in range(3)
    }
    page = recall.PAGE.with_suffix(".md").read_text()
    assert report(runs) in page
    far = [row for key, run in runs.items() if key.startswith("pairs hybrid")
           for row in run["answers"] if row["kind"] == "csa" and row["depth"] < 1]  # fmt: skip
    assert {row["chosen"] for row in far} == {1.0}
    masses = [row["entries"] for row in far]
    assert f"put {min(masses):.2f} to {max(masses):.2f} of its attention there" in page
    for task, count in {"pairs": 192, "gist": 176}.items():
        beyond = [cell["count"] for cell in runs[f"{task} hybrid 0"]["cells"] if cell["beyond"]]
        assert sum(beyond) == count
        assert f"{count} questions" in page
