"""What ``docs/first_hour.md`` shows is what its commands print: same lines, numbers aside.

The runs are shortened to four steps; a number is anything that machine, load or length may change.
"""

import re
from pathlib import Path

import pytest

from tests.integration.first_hour import DOCUMENT, readme_commands, run_in

NUMBER = re.compile(r"\d[\d.,:e+-]*")


def masked(line):
    return NUMBER.sub("#", line).strip()


def documented():
    """Command -> lines that the document shows of it."""
    blocks = re.findall(r"```console\n\$ (.*?)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return {command: text.splitlines() for command, text in blocks}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hour")
    return folder, dict(run_in(folder, ["train.steps=4", "sample.tokens=2"]))


def test_the_document_shows_the_commands_of_the_readme():
    assert list(documented()) == readme_commands()


def test_every_line_shown_is_printed(outputs):
    _, printed = outputs
    for command, lines in documented().items():
        found = {masked(line) for line in printed[command]}
        wanted = {masked(line) for line in lines} - {"..."}
        assert wanted - found == set(), command


def test_both_runs_and_the_export_say_the_same_of_the_text(outputs):
    """The export holds bf16, so a weight moves by 2^-9 of itself at most; the loss by less."""
    _, printed = outputs
    scores = [
        float(re.search(r'"nats_per_token": ([\d.]+)', "\n".join(lines))[1])
        for command, lines in printed.items()
        if command.startswith("v4 score")
    ]
    assert len(scores) == 2
    assert scores[0] == pytest.approx(scores[1], rel=5e-3)


def test_the_comparison_names_what_differs(outputs):
    folder, _ = outputs
    report = (Path(folder) / "comparison" / "report.md").read_text()
    assert "`optim" in report
    assert "![" in report
