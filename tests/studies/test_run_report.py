"""``v4 report`` of runs and sweeps: none is dropped, seeds are grouped, unlike losses not compared.

Runs are folders as the trainer leaves them, with losses that are known.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from scripts import report
from scripts.reports.plots import draw_groups, lines
from tests.helpers import small_config
from tests.studies.folders import leave_run
from train.config.command_line import compose_run
from train.config.schema import RunConfig
from train.errors import UserError
from train.record.ranking import (
    BITS,
    LOSS,
    OTHER_TEXT,
    find_runs,
    rank,
    ranking_lines,
    read_summary,
)


def leave(folder, loss, lr=1e-3, seed=0, **more):
    run = RunConfig(model=small_config(), seed=seed)
    run.optim.lr = lr
    return leave_run(folder, run, {10: loss + 1.0, 20: loss}, **more)


def unfinish(folder, keep=1):
    """As a run that was killed after its ``keep`` first lines."""
    (folder / "receipt.json").unlink()
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:keep]) + '{"step": 11, "lo')
    return folder


def with_tokenizer(folder, name):
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["data"]["tokenizer"] = {"hash": name}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    return folder


def written(tmp_path, *folders):
    out = tmp_path / "out"
    assert report.main([*map(str, folders), "--out", str(out)]) == 0
    return (out / "report.md").read_text(), (out / "report.html").read_text()


def table(text, heading):
    """Rows of the first table under a heading, cells as text."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_a_run_named_twice_or_copied_is_one_seed(tmp_path, capsys):
    first, copy = leave(tmp_path / "runs" / "a", 3.0), leave(tmp_path / "runs" / "b", 3.0)
    text, _ = written(tmp_path, first, first.parent, copy)
    assert [row[2] for row in table(text, "Ranking")] == ["1"]
    assert "[2 runs of 1 seed, finished]" in capsys.readouterr().out


def test_a_folder_with_a_config_alone_is_no_run(tmp_path):
    run = leave(tmp_path / "runs" / "a", 3.0)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("defaults: []\n")
    assert find_runs(tmp_path) == [run]


@pytest.mark.parametrize("count", [1, 2, 8, 30, 60])
def test_every_run_is_drawn_and_told_apart(count, tmp_path):
    folders = [leave(tmp_path / f"run{n}", 3.0 + n / 10, lr=1e-3 + n / 1e5) for n in range(count)]
    ranking = rank([read_summary(folder) for folder in folders])
    axes = draw_groups(ranking).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == count
    looks = {(line.colour, line.style) for line in lines(count)}
    assert len(looks) == count
    validation = {line.get_ydata()[-1] for line in axes.lines if len(line.get_ydata()) == 2}
    for n in range(count):
        assert any(np.isclose(3.0 + n / 10, last) for last in validation), n


def test_configurations_are_ranked_and_seeds_grouped_with_their_band(tmp_path):
    losses = {1e-3: (3.0, 3.2, 3.4), 2e-3: (2.0, 2.2, 2.4), 4e-3: (4.0,)}
    folders = [
        leave(tmp_path / f"{lr}_{seed}", loss, lr, seed)
        for lr, seeds in losses.items()
        for seed, loss in enumerate(seeds)
    ]
    text, _ = written(tmp_path, *folders)
    assert table(text, "Ranking") == [
        ["1", "optim.lr=0.002", "3", "1.1000 (1.0000 to 1.2000)", "2.2000 (2.0000 to 2.4000)"],
        ["2", "optim.lr=0.001", "3", "1.6000 (1.5000 to 1.7000)", "3.2000 (3.0000 to 3.4000)"],
        ["3", "optim.lr=0.004", "1", "2.0000", "4.0000"],
    ]
    assert len(table(text, "Runs")) == 7
    bands = draw_groups(rank([read_summary(folder) for folder in folders])).axes[0].collections
    assert len(bands) == 2, "one a configuration with several seeds"
    assert "optim.lr=0.002 leads with val_bits_per_byte 1.1000" in text


def test_runs_that_have_not_finished_are_there_too(tmp_path):
    done, killed = leave(tmp_path / "a", 3.0), unfinish(leave(tmp_path / "b", 2.0, lr=5e-3))
    started = unfinish(leave(tmp_path / "c", 2.0, lr=6e-3), keep=0)
    text, _ = written(tmp_path, done, killed, started)
    rows = {row[0]: row for row in table(text, "Runs")}
    assert [rows[name][1:3] for name in "abc"] == [
        ["finished", "20"], ["stopped", "10"], ["stopped", "0"],
    ]  # fmt: skip
    ranked = [row[1:4:2] for row in table(text, "Ranking")]
    assert ranked == [
        ["optim.lr=0.001", "1.5000"], ["optim.lr=0.005", "1.5000"],
        ["optim.lr=0.006", "not evaluated yet"],
    ]  # fmt: skip
    assert "Not all runs have done as many steps." in text
    metrics = started / "metrics.jsonl"
    metrics.write_text('{"step": 7, "tokens": 448, "loss": 5.25}\n')
    text, _ = written(tmp_path, done, killed, started)
    assert table(text, "Ranking")[2][3] == "not evaluated yet (training loss 5.2500 at step 7)"


def test_bits_per_byte_come_first_where_tokenizers_differ(tmp_path):
    """The second has the lower loss of its smaller tokens, and needs more bits for the text."""
    one = with_tokenizer(leave(tmp_path / "a", 4.0, bits_per_nat=0.4), "large")
    other = with_tokenizer(leave(tmp_path / "b", 3.0, lr=2e-3, bits_per_nat=0.7), "small")
    alike = with_tokenizer(leave(tmp_path / "c", 3.5, lr=3e-3, bits_per_nat=0.4), "large")
    assert rank([read_summary(one), read_summary(alike)]).unlike == ""
    text, _ = written(tmp_path, one, other)
    assert "since the tokenizers differ" in text
    assert text.index("bits per byte |") < text.index("val_loss, nats per token")
    assert [row[1] for row in table(text, "Ranking")] == ["optim.lr=0.001", "optim.lr=0.002"]
    ranking = rank([read_summary(one), read_summary(other)])
    assert ranking.measure == BITS
    drawn = [line for line in draw_groups(ranking).axes[0].lines if len(line.get_xdata())]
    assert max(max(line.get_ydata()) for line in drawn) < 3, "no nats on an axis of bits"


def test_runs_that_read_other_text_are_not_ranked_together(tmp_path, capsys):
    """Of one split, cut after other bytes: the easier text would lead."""
    one, other = leave(tmp_path / "a", 4.0), leave(tmp_path / "b", 3.0, lr=2e-3, text="other")
    alike = leave(tmp_path / "c", 3.5, lr=3e-3)
    ranking = rank([read_summary(folder) for folder in (other, one, alike)])
    assert [[g.label for g in some] for some in ranking.by_text] == [
        ["optim.lr=0.003", "optim.lr=0.001"], ["optim.lr=0.002"],
    ]  # fmt: skip
    text, _ = written(tmp_path, one, other, alike)
    assert "the evaluated texts differ" in text
    assert "optim.lr=0.003 leads" in text
    assert "among the 2 that were evaluated on its text" in text
    told = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(told) if line.startswith("evaluated on other text"))
    assert told[at + 1] == "  1. 1.5000 [finished]  optim.lr=0.002"


def test_an_old_run_without_the_texts_hash_is_known_by_the_rows_it_asked_for(tmp_path):
    old, new = leave(tmp_path / "a", 4.0), leave(tmp_path / "b", 3.0, lr=2e-3)
    for name in ("metrics.jsonl", "receipt.json"):
        path = old / name
        path.write_text(path.read_text().replace("val_text", "forgotten"))
    assert rank([read_summary(old), read_summary(new)]).unlike == ""
    config = old / "config.yaml"
    config.write_text(config.read_text().replace("eval_tokens: 65536", "eval_tokens: 64"))
    assert "texts differ" in rank([read_summary(old), read_summary(new)]).unlike


def test_an_old_evaluation_asked_for_the_rows_of_a_runs_last_one(tmp_path):
    """``train.final_eval_tokens`` where it is given: the records of a run are of other rows."""

    def asked(name, metrics, **tokens):
        run = RunConfig(model=small_config())
        run.train = replace(run.train, **tokens)
        folder = leave_run(tmp_path / name, run, {10: 4.0})
        receipt = json.loads((folder / "receipt.json").read_text())
        (folder / "receipt.json").write_text(json.dumps(receipt | {"metrics": metrics}))
        return read_summary(folder).text_asked

    evaluation, both = {"val_loss": 4.0}, {"eval_tokens": 64, "final_eval_tokens": 128}
    assert asked("a", evaluation, **both) == asked("b", None, eval_tokens=128)
    assert asked("c", None, **both) == asked("d", None, eval_tokens=64)
    assert asked("e", evaluation, eval_tokens=64) == asked("f", None, eval_tokens=64)


def test_the_remedy_for_other_text_reads_the_whole_split():
    words = [word for word in OTHER_TEXT.split() if word.startswith("train.")]
    run = compose_run(["model=v4_nano", *words])
    assert run.train.eval_only
    assert run.train.final_eval_tokens == 0


def test_losses_rank_where_a_run_has_nothing_else_and_they_compare(tmp_path):
    folders = [leave(tmp_path / "a", 3.0), leave(tmp_path / "b", 2.0, lr=2e-3)]
    for name in ("metrics.jsonl", "receipt.json"):
        path = folders[1] / name
        path.write_text(path.read_text().replace(BITS, "forgotten"))
    ranking = rank([read_summary(folder) for folder in folders])
    assert ranking.measure == LOSS
    assert [group.mean(LOSS) for group in ranking.groups] == [2.0, 3.0]


def test_a_sweeps_folder_stands_for_its_runs(tmp_path):
    for n in range(3):
        leave(tmp_path / "x_sweep" / f"optim.lr={n}", 3.0 - n, lr=1e-3 * (n + 1))
    (tmp_path / "x_sweep" / ".hydra").mkdir()
    (tmp_path / "x_sweep" / ".hydra" / "config.yaml").write_text("a: 1\n")
    assert len(find_runs(tmp_path / "x_sweep")) == 3
    text, html = written(tmp_path, tmp_path / "x_sweep")
    assert table(text, "Ranking")[0][1] == "optim.lr=0.003"
    assert set(re.findall(r'(?:src|href)="(.{5})', html)) == {"data:"}
    told = ranking_lines(rank([read_summary(f) for f in find_runs(tmp_path / "x_sweep")]))
    assert told[:2] == ["ranking by val_bits_per_byte:", "  1. 0.5000 [finished]  optim.lr=0.003"]
    assert len(told) == 4


def test_seeds_of_a_group_stand_under_what_they_share(tmp_path):
    """Never under the name of one seed: alone, beside others, and where many keys differ."""
    sweep = tmp_path / "seeds"
    for seed in range(3):
        leave(sweep / f"seed={seed}", 3.0 + seed, seed=seed)
    assert labels(find_runs(sweep)) == ["seeds"]
    sweep = tmp_path / "both"
    for lr in (1e-3, 2e-3):
        for seed in range(2):
            leave(sweep / f"optim.lr={lr},seed={seed}", 3.0 + lr, lr, seed)
    assert labels(find_runs(sweep)) == ["optim.lr=0.001", "optim.lr=0.002"]
    only = [folder for folder in find_runs(sweep) if "0.002" in folder.name]
    assert labels(only) == ["optim.lr=0.002"]
    mine = [leave(tmp_path / name, 3.0, seed=seed) for seed, name in enumerate(("a", "b"))]
    assert labels(mine) == ["a and 1 more"]


def labels(folders):
    return [group.label for group in rank([read_summary(folder) for folder in folders]).groups]


def test_report_goes_where_it_says_and_a_name_of_a_page_gives_a_page(tmp_path, monkeypatch, capsys):
    folder = leave(tmp_path / "a", 3.0)
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "new" / "x.html"
    assert report.main([str(folder), "--out", str(page)]) == 0
    assert [path.name for path in page.parent.iterdir()] == ["x.html"]
    text = page.read_text()
    assert set(re.findall(r'(?:src|href)="(.{5})', text)) == {"data:"}
    assert f"report: {page}\n" in capsys.readouterr().out
    assert report.main([str(folder), "--out", str(page)]) == 0, "over an earlier one"
    page.write_text("mine")
    assert report.main([str(folder), "--out", str(page)]) == 2
    assert page.read_text() == "mine"
    assert report.main(["study=muon_vs_adamw", "--out", str(page)]) == 2
    capsys.readouterr()
    assert report.main([str(folder)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("writing to runs/comparison; --out takes")
    assert "report: runs/comparison/report.md and report.html" in told
    assert (tmp_path / "runs" / "comparison" / "report.html").is_file()


def test_losses_that_are_not_finite_come_last(tmp_path):
    folders = [leave(tmp_path / "a", 3.0), leave_run(tmp_path / "b", RunConfig(), {20: None})]
    text, _ = written(tmp_path, *folders)
    assert [row[3] for row in table(text, "Ranking")] == ["1.5000", "not finite"]


@pytest.mark.parametrize("name", ["config.yaml", "receipt.json", "metrics.jsonl"])
def test_damage_is_named(name, tmp_path, capsys):
    folder = leave(tmp_path / "a", 3.0)
    lines = (folder / "metrics.jsonl").read_text()
    (folder / name).write_text(": [" if name != "metrics.jsonl" else "nothing\n" + lines)
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert name in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path)
