"""Adding a thing is local, tried for real: a variant of each kind, in a copy of the tree.

The edits are those that ARCHITECTURE's table "Where a new thing goes" names, and its counts are the
counts of these edits. One run of two steps trains with all of them, audited: so the attention, the
optimizer's update and the source are what was asked for, by what ran.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.helpers import ROOT

PACKAGES = ("conf", "data", "model", "optim", "parallel", "quant", "scripts", "train")


@dataclass(frozen=True)
class Edit:
    """Text for a new file, or lines that go behind a line that stands there already.

    ``instead`` leaves that line out.
    """

    path: str
    text: str
    behind: str = ""
    instead: bool = False

    def apply(self, tree):
        path = tree / self.path
        if not self.behind:
            path.parent.mkdir(exist_ok=True)
            path.write_text(self.text)
            return
        before = path.read_text()
        assert before.count(self.behind) == 1, f"{self.path}: {self.behind!r}"
        new = self.text if self.instead else self.behind + self.text
        path.write_text(before.replace(self.behind, new))

    @property
    def lines(self):
        return len(self.text.strip("\n").splitlines())


ATTENTION = [
    Edit("model/attention/half.py", '''"""Window attention over half as many tokens."""

from __future__ import annotations

from model.attention.core import WindowAttention
from model.config import LayerKind, ModelConfig


class HalfWindowAttention(WindowAttention):
    """Sees half the window."""

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str, ratio: int) -> None:
        super().__init__(config, kind, name)
        self.window = max(1, config.sliding_window // 2)
'''),
    Edit("model/config.py", '    half = "half"  # half the window\n',
         '    swa = "swa"  # nothing: window only\n'),
    Edit("model/attention/__init__.py", "from model.attention.half import HalfWindowAttention\n",
         "from model.attention.hca import HeavilyCompressedAttention\n"),
    Edit("model/attention/__init__.py", "    LayerKind.half: HalfWindowAttention,\n",
         "    LayerKind.hca: HeavilyCompressedAttention,\n"),
    Edit("model/flops.py", "    if kind is LayerKind.half:\n"
         "        return Keys(mean_min(max(1, config.sliding_window // 2), seq_len))\n",
         "        return Keys(mean_min(seq_len, seq_len))\n"),
]  # fmt: skip
ENGINE = [
    Edit("optim/sign.py", '''"""Signs of the momentum, with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from optim.groups import ParamRecord

BETA = 0.9


class SignDescent:
    """w <- w (1 - lr wd) - lr sign(m);  m <- beta m + (1 - beta) g."""

    algorithm = "sign"

    def __init__(self, records: Sequence[ParamRecord], parameters: Mapping[str, Tensor]) -> None:
        self.decay = {record.name: record.weight_decay for record in records}
        self.parameters = {name: parameters[name] for name in self.decay}
        self.state = {n: {"momentum": torch.zeros_like(p)} for n, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Move the named parameters."""
        moved = list(names)
        for name in moved:
            parameter, momentum = self.parameters[name], self.state[name]["momentum"]
            if parameter.grad is not None:
                momentum.lerp_(parameter.grad, 1 - BETA)
            parameter.mul_(1 - lr * self.decay[name]).sub_(momentum.sign(), alpha=lr)
        return moved
'''),
    Edit("optim/config.py", '    sign = "sign"\n', '    muon = "muon"\n'),
    Edit("optim/groups.py", '    sign = "sign"\n', '    muon = "muon"\n'),
    Edit("optim/groups.py", "        Owner.sign: config.adamw.weight_decay,\n",
         "        Owner.muon: config.muon.weight_decay,\n"),
    Edit("optim/build.py", "from optim.sign import SignDescent\n",
         "from optim.muon_distributed import ShardedMuon\n"),
    Edit("optim/build.py", '''    Owner.sign: lambda parameters, table, config, *_: SignDescent(
        [r for r in table if r.owner is Owner.sign], parameters
    ),
''', "    Owner.muon: _build_muon,\n"),
]  # fmt: skip
CHECK = [
    Edit("train/audit/updates.py", '''

def _sign_form(e: Evidence, name: str, sample: Sample, after: Tensor) -> Iterator[str]:
    decay = 1 - e.step.lr * e.records[name].weight_decay
    update = (sample.before * decay - sample.of(after)) / e.step.lr
    if not float((update.abs() - 1).clamp(min=0).max()) <= 1e-3:
        yield f"{name}: sign was asked for, but an element moved by more than the rate"
''', "    return energy, float(root_sum_square(off)) ** 2 / max(energy, 1e-30)\n"),
    Edit("train/audit/updates.py",
         "    Owner.sign: KnownUpdate(_sign_form, lambda e, name: 1.0, lambda e, name: 1.0),\n",
         "UPDATES: dict[Owner, KnownUpdate] = {\n"),
]  # fmt: skip
OPTIMIZER = [
    *ENGINE,
    *CHECK,
    Edit("conf/optim/sign.yaml", "# Signs of the momentum.\nname: sign\n"),
]  # fmt: skip
SOURCE = [
    Edit("data/csv_reader.py", '''"""Documents of a CSV file with a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from data.readers import Place, RawDocument, UnreadableFile


def csv_rows(path: str, column: str, start: Place) -> Iterator[RawDocument]:
    """Documents in the order of the rows; a row without the column is told.

    Raises:
        UnreadableFile: it is not UTF-8 or no CSV.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                if number >= start.number:
                    text, after = row.get(column), Place(0, number + 1)
                    fault = "" if text is not None else f"has no column {column!r}"
                    yield RawDocument(text or "", number, after, fault)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFile(str(error)) from error
'''),
    Edit("data/config.py", '    csv = "csv"  # with a header, the text under ``text_key``\n',
         '    jsonl = "jsonl"  # JSON lines, the text under ``text_key``\n'),
    Edit("data/config.py",
         '    "text_key": {SourceKind.csv, SourceKind.jsonl, SourceKind.parquet, SourceKind.hub},'
         "\n",
         '    "text_key": {SourceKind.jsonl, SourceKind.parquet, SourceKind.hub},\n', instead=True),
    Edit("data/files.py", '    SourceKind.csv: (".csv",),\n',
         '    SourceKind.text: (".txt", ".text", ".md", ".rst"),\n'),
    Edit("data/sources.py", "from data.csv_reader import csv_rows\n",
         "from data.corpus import embedded_documents\n"),
    Edit("data/sources.py", "            elif source.kind is SourceKind.csv:\n"
         "                yield from csv_rows(path, source.text_key, self._place)\n",
         "                yield from text_rows(path, source.unit, self._place)\n"),
    Edit("conf/data/csv.yaml", """# CSV with a header. data=csv data.sources.csv.path=...
defaults:
  - default
  - _self_

sources:
  csv:
    kind: csv
    path: ???
"""),
]  # fmt: skip
SIZE = [
    Edit("conf/model/v4_trial.yaml", (ROOT / "conf/model/v4_tiny.yaml").read_text()
         .replace("v4_tiny", "v4_trial").replace("[swa, swa, csa", "[swa, half, csa")),
    Edit("conf/train/v4_trial.yaml", (ROOT / "conf/train/v4_tiny.yaml").read_text()),
]  # fmt: skip
METRIC = [
    Edit("train/record/metrics.py",
         '    Metric("busy_experts", "experts that got a token, all layers", Reduction.same),\n',
         '        healthy="0 where a step has 20 copies of tokens for each expert",'
         " advice=_BALANCE,\n    ),\n"),
    Edit("train/record/metrics.py",
         '        "busy_experts": sum(int((load_E > 0).sum()) for load_E in loads),\n',
         '        "dead_experts": sum(int((load_E == 0).sum()) for load_E in loads),\n'),
]  # fmt: skip
ADDITIONS = {
    "attention variant": ATTENTION,
    "optimizer": OPTIMIZER,
    "data source": SOURCE,
    "model size": SIZE,
    "metric": METRIC,
}


def tree_with(folder, edits):
    """A copy of the packages with edits."""
    tree = folder / "tree"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package)
    for edit in edits:
        edit.apply(tree)
    return tree


def start(tree, words):
    """Run the trainer of a tree; gives exit code and what it printed."""
    line = [sys.executable, str(tree / "train" / "pretrain.py"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(line, cwd=tree, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of two steps in a copy of the tree that has all additions."""
    folder = tmp_path_factory.mktemp("additions")
    tree = tree_with(folder, [edit for edits in ADDITIONS.values() for edit in edits])
    paragraphs = (ROOT / "docs" / "reference" / "model.md").read_text().split("\n\n")
    with (folder / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([p] for p in paragraphs * 3 if len(p) > 100)])
    words = [
        "model=v4_trial", "optim=sign", "optim.lr=1e-3", "data=csv",
        f"data.sources.csv.path={folder / 'texts.csv'}", "data.tokenizer=byte",
        f"data.cache_dir={folder / 'cache'}", "data.validation.bytes=500",
        "data.validation.max_overlap=1", "train.steps=2", "train.device=cpu",
        "train.eval_tokens=512", "sample.tokens=0", f"run_dir={folder / 'run'}",
    ]  # fmt: skip
    code, printed = start(tree, words)
    assert code == 0, printed[-3000:]
    return folder / "run"


def test_one_run_trains_with_every_addition(run):
    config = (run / "config.yaml").read_text()
    assert re.search(r"^ +- half$", config, re.MULTILINE)
    assert re.search(r"^ +kind: csv$", config, re.MULTILINE)
    with (run / "params.csv").open() as file:
        owners = {row["name"]: row["owner"] for row in csv.DictReader(file)}
    assert owners["layers.1.attn.wq_a.weight"] == "sign"
    assert owners["embed.weight"] == "adamw"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["busy_experts"] > 0 for record in records)
    assert json.loads((run / "receipt.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("without", "names"),
    [
        (("optim/groups.py", "optim/build.py", "train/audit"), "optim/groups.py has no owner sign"),
        (("Owner.sign: config", "optim/build.py", "train/audit"), "no weight decay"),
        (("train/audit",), "UPDATES of train/audit/updates.py"),
        (("optim/build.py",), "no engine of sign in ENGINES"),
    ],
)
def test_an_optimizer_is_refused_while_a_part_of_it_lacks(without, names, tmp_path):
    """It never runs as another one: the line says which file lacks what."""
    edits = [e for e in OPTIMIZER if not any(w in e.path or w in e.text for w in without)]
    assert len(edits) < len(OPTIMIZER)
    tree = tree_with(tmp_path, edits)
    words = ["model=v4_tiny", "optim=sign", "data.tokenizer=byte", "train.device=cpu",
             f"run_dir={tmp_path / 'run'}"]  # fmt: skip
    code, printed = start(tree, words)
    assert code == 2, printed[-3000:]
    assert names in printed
    assert "Traceback" not in printed
    assert "step 1/" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", list(ADDITIONS))
def test_the_table_says_how_much_was_touched(name):
    edits = ADDITIONS[name]
    new = {edit.path for edit in edits if not edit.behind}
    changed = {edit.path for edit in edits} - new
    lines = sum(edit.lines for edit in edits if edit.path not in new)
    row = next(
        line for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines()
        if line.startswith(f"| {name} |")
    )  # fmt: skip
    assert row.endswith(f"| {len(new)} new; {len(changed)} changed, {lines} lines |"), row
    for path in {edit.path for edit in edits} - {e.path for e in edits if e.path in new}:
        assert f"`{path}`" in row, path
