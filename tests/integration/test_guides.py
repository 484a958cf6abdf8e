"""Commands of the guides and of the README can be run as typed: what they ask for exists.

A line of the trainer is composed into a run, with its files not looked for; a line of another
command must use options that its source declares.
"""

import re
import shlex
from pathlib import Path

import pytest

from scripts.__main__ import COMMANDS
from scripts.bench import BENCHMARKS
from scripts.studies.config import load_study
from tests.helpers import ROOT
from train.config.command_line import compose_run

GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "studies" / "README.md", *GUIDES]
TRAINER = ("train/pretrain.py", "pretrain")


def lines(path):
    blocks = re.findall(r"```\w*\n(.*?)```", path.read_text(), re.DOTALL)
    found = [line for block in blocks for line in block.splitlines()]
    return [line for line in found if re.match(r"(v4|torchrun|python|sbatch) ", line)]


CASES = [(path.stem, line) for path in DOCUMENTS for line in lines(path)]


def test_guides_hold_commands():
    assert len(GUIDES) == 9
    assert {path.stem for path in GUIDES} <= {stem for stem, _ in CASES}


def source_of(module):
    return (ROOT / f"{module.partition(':')[0].replace('.', '/')}.py").read_text("utf-8")


def sources(name, rest):
    """Text of a command and of the modules of scripts/ that it imports."""
    text = source_of(BENCHMARKS[rest[0]] if name == "bench" else COMMANDS[name])
    return text + "".join(map(source_of, re.findall(r"from (scripts\.\S+) import", text)))


def first_and_last(word):
    """Of a sweep's values."""
    key, _, values = word.partition("=")
    return [f"{key}={value}" for value in (values.split(",")[0], values.split(",")[-1])]


@pytest.mark.parametrize(("document", "line"), CASES, ids=lambda v: v[:60])
def test_command_asks_for_what_exists(document, line):
    words = shlex.split(line)
    program = next((w for w in words if w in TRAINER), None)
    if words[0] == "sbatch":
        words = words[words.index("scripts/launch.slurm") + 1 :]
        compose_run(words)
    elif program is not None:
        words = [w for w in words[words.index(program) + 1 :] if w not in ("-m", "--help")]
        swept = "-m" in shlex.split(line)
        for chosen in zip(*map(first_and_last, words), strict=True) if swept else [words]:
            compose_run(chosen)
    else:
        name, *rest = words[1:] if words[0] == "v4" else [Path(words[1]).stem, *words[2:]]
        text = sources(name, rest)
        for option in (w for w in rest if w.startswith("--")):
            assert f'"{option}"' in text, f"{line}: {name} has no {option}"
        asked = [w.partition("=")[2] for w in rest if w.startswith("study=")]
        if asked and asked[0] != "NAME":
            load_study(asked[0], [w for w in rest if "=" in w and not w.startswith("study=")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link


def test_switches_of_an_ablation_compose():
    text = (ROOT / "docs" / "guide" / "studies.md").read_text().partition("Switches:")[2]
    switches = re.findall(r"`([^`]*=[^`]*)`", text)
    assert len(switches) >= 7
    for switch in switches:
        compose_run(["model=v4_nano", *switch.split()])
