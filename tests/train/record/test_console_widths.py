"""The console on terminals of several widths: lines stay, nothing tears, no number is cut.

A child writes the records below in a pseudo-terminal; what it wrote is played on a terminal of that
width, whose rows are looked at.
"""

import io
import json
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.train.record.terminal import recorded, screen
from train.display.console import Console
from train.record.metrics import METRICS

STEPS = 1200
VALUES = {
    "loss": 5.3904217, "loss_mtp": 5.453, "loss_indexer": 0.01719, "lr": 3.661e-4,
    "grad_norm": 12345.678, "tokens_per_second": 351234.5, "mfu": 0.0431, "skipped_steps": 3,
}  # fmt: skip
EVALUATED = {"val_loss": 5.30123, "val_bits_per_byte": 4.19512}
CHILD = """
import json, logging, sys
from train.display.console import Console
logging.basicConfig(level=logging.INFO, format="%(message)s")
console = Console(int(sys.argv[1]), 0, 5)
for line in sys.stdin if not sys.stdin.isatty() else open(sys.argv[2]):
    record = json.loads(line)
    console.microbatch(record["step"], 3, 16, 25.0 if record["step"] == 8 else 0.0)
    console.show(record)
    if record["step"] == 7:
        logging.info("saved runs/first/checkpoints/step_00000007")
console.close()
sys.stderr.write("error: the end\\n")
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("console") / "records.jsonl"
    lines = [{"step": step, **VALUES, **(EVALUATED if step == 6 else {})} for step in range(1, 13)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_terminal_keeps_lines_and_cuts_no_number(columns, records):
    command = [sys.executable, "-c", CHILD, str(STEPS), str(records)]
    written = recorded(command, columns, {"PYTHONPATH": str(ROOT)})
    rows = screen(written, columns)
    assert not any(over for _, over in rows), "a line runs over the terminal's end"
    lines = [row for row, _ in rows if row]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{n}/{STEPS}" for n in (1, 5, 6, 10)]
    known = {f"{name} {value:.4g}" for name, value in {**VALUES, **EVALUATED}.items()}
    names = {metric.name for metric in METRICS}
    for line in [*steps, lines[-2]]:
        told = re.findall(r"(\w+) (\S+)", line)
        shown = [f"{name} {value}" for name, value in told if name in names - {"step"}]
        assert set(shown) <= known, line
        assert "loss 5.39" in line
    assert "val_loss 5.301" in steps[2]
    assert lines[-2].startswith(f"12/{STEPS} |"), "the bar stands last"
    assert "val_loss 5.301" in lines[-2], "the newest validation loss stays"
    assert "microbatch 3 of 16" in written
    assert "saved runs/first/checkpoints/step_00000007" in lines
    assert lines[-1] == "error: the end", "what follows a bar begins a line"


def test_pipe_gets_lines_alone(records):
    """As in a log, under torchrun with redirected output, and in a notebook's cell."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(STEPS), str(records)], cwd=ROOT, capture_output=True,
        text=True, check=True, input=records.read_text(),
    )  # fmt: skip
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line.split()[:2] for line in lines if " loss " in line] == [
        ["step", f"{n}/{STEPS}"] for n in (1, 5, 6, 10)
    ]
    assert f"step 8/{STEPS} microbatch 3 of 16, 0:25 since it began" in lines
    for name, value in VALUES.items():
        assert f"{name} {value:.4g}" in lines[0]


class Cell(io.StringIO):
    """stderr of a notebook's cell, as ipykernel's OutStream: no terminal, and no descriptor."""


def test_notebooks_cell_gets_lines_alone(records, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", cell := Cell())
    monkeypatch.setattr("os.get_terminal_size", lambda fd: pytest.fail("there is no terminal"))
    console = Console(STEPS, 0, every=5)
    with caplog.at_level("INFO"):
        for line in records.read_text().splitlines():
            console.show(json.loads(line))
    console.close()
    assert cell.getvalue() == "", "no bar"
    assert [line.split()[1] for line in caplog.messages] == [f"{n}/{STEPS}" for n in (1, 5, 6, 10)]
