"""What a report says of runs whose losses are known, and why two runs differ.

Losses are written by ``folders.leave_run``: a power law of the steps with noise of a known size per
seed and arm, so that verdicts and the steps to a loss can be computed by hand.
"""

import json
import math
import random
import re
from itertools import product

import pytest

from scripts import report
from scripts.reports.differences import differences, explain, parting_step
from scripts.reports.study_report import study_document, write_study_report
from scripts.studies.archive import open_archive
from scripts.studies.cells import Cell
from scripts.studies.config import AGAIN, load_study
from scripts.studies.protocol import Protocol
from scripts.studies.results import gather
from scripts.studies.statistics import Finding, judge, paired
from scripts.studies.store import Store
from tests.helpers import ROOT
from tests.studies.folders import CODE, leave_run
from train.errors import UserError
from train.record.ranking import read_summary

WORDS = ["steps=100", "seeds=[1,2,3]", "catch_up.fractions=[0.25,0.5]"]


def protocol(tmp_path, *words, name="muon_vs_adamw"):
    config = load_study(name, [*(WORDS if name == "muon_vs_adamw" else []), *words])
    return Protocol(config, Store([tmp_path / "runs"], CODE), tmp_path / "runs")


def fill(tmp_path, effect, sigma=0.01, skip=(), *words):
    """Finish every run: muon's loss is 6 - log2(steps / 10); adamw's lies ``effect`` above."""
    generator = random.Random(5)
    plan = protocol(tmp_path, *words)
    for arm, grid in (("muon", [4e-3, 8e-3, 1.6e-2]), ("adamw", [2e-3, 4e-3, 8e-3])):
        for rate, loss in zip(grid, (5.0, 4.0, 5.0), strict=True):
            leave(tmp_path, plan, Cell(arm, plan.search_steps, rate, 0), loss)
    cells = [("muon", 8e-3, n) for n in (25, 50, 100)]
    cells += [("adamw", 4e-3, 100), (AGAIN, 8e-3, 100)]
    for arm, rate, steps in cells:
        for seed in plan.study.seeds:
            order = 0.1 * seed  # what data order does to all arms alike
            loss = 6 - math.log2(steps / 10) + order + generator.gauss(0, sigma)
            loss += effect if arm == "adamw" else 0
            if (arm, seed) not in skip:
                leave(tmp_path, plan, Cell(arm, steps, rate, seed), loss)
    return protocol(tmp_path, *words)


def leave(tmp_path, plan, cell, loss, **more):
    folder = tmp_path / "runs" / f"{cell.arm}_{cell.steps}_{cell.lr}_{cell.seed}"
    curve = {max(1, cell.steps // 4): loss + 0.5, cell.steps: loss}
    leave_run(folder, plan.config(cell), curve, **more)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The report of a study in which adamw lies 0.5 nats above muon."""
    folder = tmp_path_factory.mktemp("planted")
    return write_study_report("muon_vs_adamw", fill(folder, 0.5), folder / "docs")


def leave_evaluation(folder, run, loss, quantised):
    """What ``eval_only`` leaves of quantised weights."""
    leave_run(folder, run, {1: loss})
    (folder / "metrics.jsonl").unlink()
    receipt = json.loads((folder / "receipt.json").read_text())
    (folder / "receipt.json").unlink()
    found = {**receipt, "metrics": receipt["final_metrics"], "quantised": quantised}
    (folder / "evaluation.json").write_text(json.dumps(found))


def test_what_rounding_takes_from_each_weight_stands_beside_the_loss(tmp_path):
    """Means over seeds of what the evaluations say; other arms have none."""
    words = ["steps=10", "seeds=[1,2]", "evaluations=2", "again=false"]
    plan = protocol(tmp_path, *words, name="fp4_qat")
    while (batch := next(plan.batches(), None)) is not None:
        for cell in batch.cells:
            folder = tmp_path / "runs" / f"{cell.arm}_{cell.lr}_{cell.seed}"
            loss = 4 + abs(math.log2(cell.lr / 1.6e-2)) + 0.1 * cell.seed
            if cell.source:
                lost = {"layers.0.ffn.experts.w1": 0.013 + 0.001 * cell.seed}
                leave_evaluation(folder, plan.config(cell), loss + 0.01 + cell.seed / 1e3, lost)
            else:
                leave_run(folder, plan.config(cell), {5: loss + 1, 10: loss})
                (folder / "checkpoints" / "step_00000010").mkdir(parents=True)
        plan.store.scan()
    text = study_document(gather("fp4_qat", plan)).markdown()
    section = text.partition("## What rounding takes from each weight")[2].partition("## ")[0]
    assert "Of arms that evaluate finished weights" in section
    assert "| weight | post_training |" in section
    assert "| layers.0.ffn.experts.w1 | 0.01450 |" in section
    assert "| all: loss minus none (nats) | +0.0115 |" in section


def test_report_finds_a_planted_effect_and_its_price_in_steps(planted):
    """Muon falls by a nat with each doubling: it needs 100 / 2^0.5 = 70.7 steps for that loss."""
    path = planted
    lines = path.read_text().splitlines()
    effect = re.match(
        r"\*\*adamw has a higher loss than muon \(\+(0\.\d+) \+- (0\.\d+) nats", lines[2]
    )
    assert effect is not None
    assert abs(float(effect[1]) - 0.5) < float(effect[2]) < 0.05
    ratio = re.search(r"muon needs (0\.\d+) \+- (0\.\d+) \(sigma", lines[2])
    assert ratio is not None
    assert abs(float(ratio[1]) - 2**-0.5) < 2 * float(ratio[2]) < 0.02
    found = json.loads((path.parent / "results.json").read_text())
    assert found["comparisons"][0]["verdict"] == "above"
    assert found["missing"] == 0
    assert found["arms"]["adamw"]["lr"] == 4e-3


def test_report_gives_no_verdict_where_nothing_differs(tmp_path):
    results = gather("muon_vs_adamw", fill(tmp_path, 0.0))
    assert results.comparisons[0].verdict is Finding.none
    assert results.floor > 0
    assert study_document(results).lead.startswith("adamw against muon: no verdict (")


def test_half_a_study_has_no_verdict_however_large_the_effect(tmp_path):
    plan = fill(tmp_path, 0.5, 0.01, [("adamw", 3)])
    results = gather("muon_vs_adamw", plan)
    assert results.comparisons[0].test is not None
    assert results.comparisons[0].test.p < 0.05
    document = study_document(results)
    assert "no verdict" in document.lead
    assert "2 of 3 seeds" in document.lead
    assert "1 runs are still to do" in document.lead


def test_verdict_waits_for_the_noise_floor(tmp_path):
    plan = fill(tmp_path, 0.5, 0.01, [(AGAIN, 2)])
    assert "the A/A pair is not there yet" in study_document(gather("x", plan)).lead


def test_losses_of_other_text_are_not_compared(tmp_path):
    """As an arm that was evaluated on another number of rows: its loss alone looks like a loss."""
    plan = fill(tmp_path, 0.5, 0.01, [("adamw", 2)])
    leave(tmp_path, plan, Cell("adamw", 100, 4e-3, 2), 3.0, bits_per_nat=0.65)
    with pytest.raises(UserError, match=r"adamw_.*_2 was evaluated on other text than .* 0\.4505 "):
        gather("muon_vs_adamw", protocol(tmp_path))


def test_rate_at_the_edge_of_the_grid_is_no_answer(tmp_path):
    plan = protocol(tmp_path, "search.extensions=0")
    for arm in ("muon", "adamw"):
        for rate in plan.study.grid(arm):
            leave(tmp_path, plan, Cell(arm, plan.search_steps, rate, 0), 5.0 + rate)
    results = gather("muon_vs_adamw", protocol(tmp_path, "search.extensions=0"))
    assert study_document(results).lead == (
        "No answer: muon: the best learning rate, 0.004, is the lowest of 3 tried (0.004 to 0.016)."
    )


def test_html_needs_no_other_file(planted):
    path = planted
    html = path.with_suffix(".html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', html)
    assert len(sources) >= 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for name in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")


def test_report_of_two_runs_says_why_they_differ(tmp_path, capsys):
    plan = protocol(tmp_path)
    for rate, seed in ((8e-3, 1), (8e-3, 2), (1e-2, 1)):
        leave(tmp_path, plan, Cell("muon", 100, rate, seed), 3.0 + seed)
    folders = sorted(path.parent for path in (tmp_path / "runs").rglob("receipt.json"))
    runs = [read_summary(folder) for folder in folders]
    assert [(d.aspect, d.key, d.values) for d in differences([runs[0], runs[1]])] == [
        ("config", "seed", ("1", "2")), ("data", "seed", ("1", "2")),
    ]  # fmt: skip
    assert parting_step(runs[0], runs[1]) == 25
    assert parting_step(runs[0], runs[2]) is None
    assert explain([runs[0], runs[2]]) == "they differ in config (1); losses are equal bit for bit"
    out = ["--out", str(tmp_path / "out")]
    assert report.main([*map(str, folders), *out]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `optim.lr` | 0.008 | 0.008 | 0.01 |" in text
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty"), str(folders[0]), *out]) == 2
    assert "holds no run" in capsys.readouterr().err


# ---- recorded losses -----------------------------------------------------------------------------
STUDIES = ROOT / "docs" / "studies"


def recorded(arm):
    """Seed -> final validation loss of a committed study's arm."""
    results = json.loads((STUDIES / "muon_vs_adamw" / "results.json").read_text())
    return {int(seed): loss for seed, loss in results["arms"][arm]["val_loss"].items()}


def test_recorded_equal_arms_give_no_verdict_in_18_of_20_repeats():
    """Every way of calling one run of each recorded A/A pair the arm and the other the baseline."""
    one, other = recorded("muon"), recorded("again")
    assert len(one.keys() & other.keys()) >= 5
    none = []
    for swapped in product((False, True), repeat=len(one)):
        pairs = dict(zip(one, swapped, strict=True))
        arm = {seed: (other if swap else one)[seed] for seed, swap in pairs.items()}
        base = {seed: (one if swap else other)[seed] for seed, swap in pairs.items()}
        test = paired(arm, base, 0.05)
        assert test is not None
        none.append(judge(test, 0.05) is Finding.none)
    assert sum(none) / len(none) >= 18 / 20


@pytest.mark.parametrize("arm", ["muon", "again", "adamw"])
def test_repeats_drawn_from_a_recorded_arm_give_no_verdict_in_18_of_20(arm):
    """50 times 20 repeats of two arms of five runs, all drawn from one arm's recorded losses."""
    losses, generator, none = sorted(recorded(arm).values()), random.Random(7), 0
    for _ in range(50 * 20):
        one, other = ({s: generator.choice(losses) for s in range(5)} for _ in range(2))
        test = paired(one, other, 0.05)
        assert test is not None
        none += judge(test, 0.05) is Finding.none
    assert none / (50 * 20) >= 18 / 20


def test_recorded_arm_with_a_tenth_of_the_tokens_is_found():
    """Muon's recorded training loss after a tenth of the steps beside that after all of them."""
    results = json.loads((STUDIES / "muon_vs_adamw" / "results.json").read_text())
    archived = open_archive(STUDIES / "archives" / "muon_vs_adamw.tar.xz").recorded
    runs = {run.name: run for run in (archived or {}).values()}
    tenth, whole = {}, {}
    for seed, name in results["arms"]["muon"]["runs"].items():
        records = runs[name].records
        whole[int(seed)] = records[-1]["loss"]
        tenth[int(seed)] = records[len(records) // 10 - 1]["loss"]
    test = paired(tenth, whole, 0.05)
    assert test is not None
    assert judge(test, 0.05) is Finding.above
    assert test.mean > test.half_width
