"""What commands write: never over a file that they did not write, and refused before the work."""

import json
import re
import threading

import pytest

from scripts import export_hf, generate, import_hf, layouts, report, samples, score, twins
from scripts.benchmarks import checkpoint, efficiency, optim, quant, recovery, step
from scripts.cli.outputs import check_output, write_json
from scripts.layout_trials import step_parts, timeline
from tests.train.exchange.exchange_models import write_run
from train.errors import ROOT, UserError
from train.exchange import export as exchange_export
from train.exchange.output_files import alone_in

MINE = "my notes\n"
# Command, words before the file, the file's name in the folder.
WRITERS = [
    (twins.main, ["--json"], "x"),
    (layouts.main, ["--json"], "x"),
    (layouts.main, ["--markdown"], "x"),
    (checkpoint.main, ["--out"], "x"),
    (recovery.main, ["--json"], "x"),
    (quant.main, ["--json"], "x"),
    (optim.main, ["--json"], "x"),
    (step.main, ["--out"], "x"),
    (step.main, ["--out"], "x.png"),
    (efficiency.main, ["--out"], "efficiency.json"),
    (efficiency.main, ["--out"], "efficiency.png"),
    (step_parts.main, ["--out"], "step_parts.json"),
    (timeline.main, ["--out"], "timeline.txt"),
    (report.main, ["a", "b", "--out"], "notes.txt"),
    (report.main, ["a", "b", "--out"], "report.html"),
]


@pytest.mark.parametrize(("main", "words", "name"), WRITERS)
def test_a_file_of_somebody_else_stays(main, words, name, tmp_path, capsys):
    (tmp_path / name).write_text(MINE)
    folder = name not in ("x", "x.png")
    assert main([*words, str(tmp_path if folder else tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "holds" in error
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: MINE}


def test_an_earlier_result_is_replaced(tmp_path):
    path = tmp_path / "new" / "x.json"
    for seq_len in ("512", "1024"):
        assert twins.main(["v4_tiny", "--seq-len", seq_len, "--json", str(path)]) == 0
        assert json.loads(path.read_text())["seq_len"] == int(seq_len)
    with pytest.raises(UserError, match="is a folder"):
        check_output("--json", tmp_path, "twins")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*file: Not a directory"):
        check_output("--json", tmp_path / "file" / "x", "twins")
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "file" / "x", {})


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("checkpoint.json", '"in front"'), ("recovery.json", '"wall_ratios"'),
        ("quant.json", '"cast_seconds"'), ("layouts.json", '"noise"'),
        ("step_8x512.json", '"environment"'), ("step_parts.json", '"compute"'),
        ("pipeline_timeline.txt", "closed"), ("step_8x512.png", "Matplotlib"),
    ],
)  # fmt: skip
def test_what_was_written_before_bears_the_mark(name, mark):
    check_output("--out", ROOT / "docs" / "bench" / name, mark)


# ---- exchange ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "run"
    write_run(folder)
    return folder


def refused(main, capsys, *words):
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_shard_size_that_cannot_be_is_refused(size, run, tmp_path, capsys):
    error = refused(export_hf.main, capsys, run, tmp_path / "out", f"--shard-gb={size}")
    assert "--shard-gb" in error
    assert not (tmp_path / "out").exists()


def test_options_without_effect_are_refused(run, tmp_path, capsys):
    for words in (
        ["--to", "quantised", "--dtype", "fp32"],
        ["--to", "official", "--experts", "fp8"],
        ["--experts", "fp4"],
    ):
        error = refused(export_hf.main, capsys, run, tmp_path / "out", *words)
        assert re.search(r"--(dtype|experts) \w+ has no effect with --to ", error)
    error = refused(generate.main, capsys, run, "--prompt", "a", "--top-p", "0.5")
    assert "--top-p 0.5 has no effect with --temperature 0" in error


@pytest.mark.parametrize("main", [export_hf.main, import_hf.main])
def test_a_folder_that_another_command_writes_into_is_refused(main, run, tmp_path, capsys):
    target = tmp_path / "out"
    with alone_in(target):
        assert "is being written by another command" in refused(main, capsys, run, target)
    assert not list(target.iterdir())
    assert main([str(run), str(target)]) == 0
    assert not list(target.glob(".*"))


def test_of_two_exports_at_once_one_leaves(run, tmp_path, monkeypatch, capsys):
    """The second starts while the first is in its first shard."""
    inside, go_on, codes = threading.Event(), threading.Event(), []
    write = exchange_export._write_shard

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(exchange_export, "_write_shard", slow)
    words = [str(run), str(tmp_path / "out")]
    first = threading.Thread(target=lambda: codes.append(export_hf.main(words)))
    first.start()
    assert inside.wait(60)
    assert "is being written by another command" in refused(export_hf.main, capsys, *words)
    go_on.set()
    first.join()
    assert codes == [0]


def test_score_refuses_a_damaged_archive_and_closes_it(run, tmp_path, capsys):
    """A file that stays open would be a warning, which is an error here."""
    for name, content in (
        ("a.npz", b"PK\x03\x04" + b"x" * 50), ("b.npz", b""), ("c.npy", b""), ("d.npz", b"ids"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert "cannot be read as token ids" in refused(score.main, capsys, run, tmp_path / name)


def test_score_takes_no_mark_for_text(run, tmp_path, capsys):
    told = []
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + "f\u00fcnf".encode())
        assert score.main([str(run), str(tmp_path / name)]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


# ---- what is read --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1}', '{"step": 1, "data": "x", "rows": 3}', '{"step": 1, "data": 5, "rows": []}',
        '{"step": 1, "data": "x", "rows": [[["t", 0, 0, 5]]]}',
        '{"step": 1, "data": "x", "rows": [[["t", 0, 0, 5, 5]]]}',
        '{"step": "1"}\n{"step": 2}', "[" * 100_000 + '\n{"step": 2}', "\ud800x\n{\"step\": 2}",
    ],
)  # fmt: skip
def test_samples_refuses_a_damaged_line(line, run, capsys):
    (run / "samples.jsonl").write_bytes(line.encode(errors="surrogatepass") + b"\n")
    assert "damaged" in refused(samples.main, capsys, run, "--step", "1")


@pytest.mark.parametrize("receipt", ["{}", "[]", "3", '{"finished": 1}', "[" * 100_000])
def test_report_refuses_a_damaged_receipt(receipt, run, tmp_path, capsys):
    (run / "receipt.json").write_text(receipt)
    error = refused(report.main, capsys, run, run, "--out", tmp_path / "out")
    assert re.search(r"receipt.json is damaged: ", error)
