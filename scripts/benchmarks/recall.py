"""Retrieval that only far reading solves, as a study: which arm finds, which gives the gist.

    python scripts/bench.py recall                               # goes on where it was stopped
    python scripts/bench.py recall --tasks gist --arms hca --seeds 0
    python scripts/bench.py recall --out docs/bench/recall       # what the page shows

Every model is experiment=recall, then experiment=recall_sparse, then probed; an arm is another
``model.attention``, a seed gives other weights and another order of documents, and all are asked
the same questions. About four minutes a model on one free core. Written are ``recall.json`` and a
picture a task; the tables are printed as they stand in docs/bench/recall.md.

A verdict: Student's t on the differences of two arms by seed, two-sided, Holm's correction over all
claims below, so that equal arms get one in at most 5 % of studies.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.cli.command import command
from scripts.cli.outputs import PNG, check_output, write_json
from scripts.cli.parser import CommandParser, whole
from scripts.studies.statistics import Paired, holm, paired
from train.errors import ROOT, UserError
from train.exchange.output_files import make_folder
from train.probes.pictures import draw_map

LEVEL = 0.05  # of all claims together
PAGE = ROOT / "docs" / "bench" / "recall"
MARK = '"study": "recall"'
ARMS = ("hybrid", "csa", "hca", "swa", "dense")
WITH_INDEXER = ("hybrid", "csa")
# the rate of each task; dense needs a lower one to learn pairs: LOG, "Context"
RATES = {"pairs": "1.5e-2", "gist": "8e-3"}
OWN_RATES = {("pairs", "dense"): "8e-3"}
CLAIMS = {
    "the hybrid finds what windows do not": ("pairs", "hybrid", "swa"),
    "CSA finds where HCA does not": ("pairs", "csa", "hca"),
    "the hybrid finds more than dense attention": ("pairs", "hybrid", "dense"),
    "HCA gives the gist where windows do not": ("gist", "hca", "swa"),
    "HCA gives more of the gist than CSA": ("gist", "hca", "csa"),
    "the hybrid gives more of the gist than HCA": ("gist", "hybrid", "hca"),
}
_Runs = Mapping[str, Any]  # of recall.json: "task arm seed" -> what the probe found


@dataclass(frozen=True)
class Model:
    """One model of the study.

    Attributes:
        task: pairs or gist.
        arm: ``model.attention``.
        seed: of the run.
    """

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folders."""
        return f"{self.task}_{self.arm}_{self.seed}"

    def commands(self, folder: Path) -> list[list[str]]:
        """The two parts of its training, and the probe."""
        rate = OWN_RATES.get((self.task, self.arm), RATES[self.task])
        first, second = folder / f"{self.name}_first", folder / self.name
        asked = [
            f"seed={self.seed}", f"model.attention={self.arm}", f"optim.lr={rate}",
            f"data.sources.pairs.tasks=[{self.task}]",
        ]  # fmt: skip
        stages = [] if self.arm in WITH_INDEXER else ["train.stages=[]"]
        only = ["needles", "attention"] if self.task == "pairs" else ["needles"]
        return [
            ["pretrain", "experiment=recall", *asked, f"run_dir={first}"],
            ["pretrain", "experiment=recall_sparse", *asked, *stages, f"init_from={first}",
             f"run_dir={second}"],
            ["probe", str(second), "--needle", self.task, "--lengths", "128,256,512", "--count",
             "16", *[word for name in only for word in ("--only", name)],
             "--out", str(folder / "probes" / self.name)],
        ]  # fmt: skip

    def found(self, folder: Path) -> Any:
        """What its probe found; None before."""
        file = folder / "probes" / self.name / "probe.json"
        if not file.is_file():
            return None
        return next(iter(json.loads(file.read_bytes())["models"].values()))


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then report."""
    args = options().parse_args(words)
    check_output("--out", args.out / "recall.json", MARK)
    for task in RATES:
        check_output("--out", args.out / f"{task}.png", PNG)
    if args.report_only:
        runs = read(args.out / "recall.json")
    else:
        models = [Model(task, arm, seed) for seed in args.seeds for task in args.tasks
                  for arm in args.arms]  # fmt: skip
        train(models, args.runs)
        runs = gather(args.runs)
        write_json(args.out / "recall.json", {"study": "recall", "runs": runs}, indent=0)
    for task in dict.fromkeys(key.split()[0] for key in runs):
        draw(task, runs, args.out / f"{task}.png")
    print(report(runs))
    return 0


def options() -> CommandParser:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=whole(least=0), default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/recall_study"), help="the models")
    parser.add_argument("--out", type=Path, default=Path("runs/recall_study/report"),
                        help="folder of the results")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="tables and pictures again")
    return parser


def train(models: Sequence[Model], folder: Path) -> None:
    """Every model that is not there, in turn.

    Raises:
        UserError: a command did not end well; it has told why.
    """
    missing = [model for model in models if model.found(folder) is None]
    print(f"{len(models)} models, {len(models) - len(missing)} are there;"
          f" about {4 * len(missing)} minutes of one free core", flush=True)  # fmt: skip
    for model in missing:
        for words in model.commands(folder):
            print(f"{model.name}: {words[0]} {words[1]}", flush=True)
            done = subprocess.run([sys.executable, "-m", "scripts", *words], cwd=ROOT, check=False)
            if done.returncode:
                raise UserError(f"{model.name}: v4 {words[0]} ended with {done.returncode}")


def gather(folder: Path) -> dict[str, Any]:
    """Of every model that is there what the page needs."""
    found = {}
    for task in RATES:
        for arm in ARMS:
            for path in sorted((folder / "probes").glob(f"{task}_{arm}_*")):
                seed = path.name.rpartition("_")[2]
                model = Model(task, arm, int(seed) if seed.isdecimal() else -1)
                if path.name == model.name and (told := model.found(folder)):
                    cells = [
                        {
                            key: cell[key]
                            for key in ("length", "depth", "beyond", "count", "correct")
                        }
                        for cell in told["needles"]
                    ]
                    answers = [
                        layer | {"depth": row["depth"]}
                        for row in told.get("answers", []) for layer in row["layers"]
                    ]  # fmt: skip
                    found[f"{task} {arm} {model.seed}"] = {"cells": cells, "answers": answers}
    return found


def read(path: Path) -> dict[str, Any]:
    """The runs of ``recall.json``.

    Raises:
        UserError: it is not there.
    """
    if not path.is_file():
        raise UserError(f"--report-only: {path} is not there; leave the option out to train")
    return json.loads(path.read_bytes())["runs"]


# ---- what was found ------------------------------------------------------------------------------
def right(runs: _Runs, task: str, arm: str, beyond: bool = True) -> dict[int, float]:
    """Seed -> share of right answers beyond (within) the reach of stacked windows."""
    found = {}
    for key, run in runs.items():
        if key.split()[:2] == [task, arm]:
            cells = [cell for cell in run["cells"] if cell["beyond"] is beyond]
            count = sum(cell["count"] for cell in cells)
            found[int(key.split()[2])] = sum(c["correct"] * c["count"] for c in cells) / count
    return found


def report(runs: _Runs) -> str:
    """The tables of the page."""
    lines = [
        "| task | arm | rate | within reach | beyond reach | by seed |",
        "|---|---|---|---|---|---|",
    ]
    for task in RATES:
        for arm in ARMS:
            far, near = right(runs, task, arm), right(runs, task, arm, beyond=False)
            if far:
                by_seed = ", ".join(f"{far[seed]:.3f}" for seed in sorted(far))
                rate = OWN_RATES.get((task, arm), RATES[task])
                lines.append(
                    f"| {task} | {arm} | {rate} | {_mean(near)} | {_mean(far)} | {by_seed} |"
                )
    lines += [
        "",
        "| claim | difference | 95 % interval | p (Holm) | verdict |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_claim_line(name, *found) for name, found in judged(runs).items()])


def judged(runs: _Runs) -> dict[str, tuple[Paired, float]]:
    """Claim -> the test, and its p value corrected for all claims that could be tested."""
    tests = {}
    for name, (task, arm, other) in CLAIMS.items():
        test = paired(right(runs, task, arm), right(runs, task, other), LEVEL)
        if test is not None:
            tests[name] = test
    corrected = holm([test.p for test in tests.values()])
    return {name: (test, p) for (name, test), p in zip(tests.items(), corrected, strict=True)}


def _claim_line(name: str, test: Paired, p: float) -> str:
    low, high = test.mean - test.half_width, test.mean + test.half_width
    verdict = "no verdict" if p >= LEVEL else "yes" if test.mean > 0 else "no, the other way round"
    return f"| {name} | {test.mean:+.3f} | {low:+.3f} to {high:+.3f} | {p:.2g} | {verdict} |"


def _mean(by_seed: Mapping[int, float]) -> str:
    return f"{statistics.fmean(by_seed.values()):.3f}"


def draw(task: str, runs: _Runs, path: Path) -> None:
    """Heat maps of right answers, depth x length: an arm a column, a seed a row."""
    mine = {tuple(key.split()[1:]): run for key, run in runs.items() if key.split()[0] == task}
    arms = [arm for arm in ARMS if any(arm == one for one, _ in mine)]
    seeds = sorted({seed for _, seed in mine}, key=int)
    figure = Figure(figsize=(2.3 * len(arms), 2.4 * len(seeds) + 0.4), layout="constrained")
    maps = figure.subplots(len(seeds), len(arms), squeeze=False)
    for (row, seed), (column, arm) in ((r, c) for r in enumerate(seeds) for c in enumerate(arms)):
        axes = maps[row, column]
        cells = mine.get((arm, seed), {"cells": []})["cells"]
        if not cells:
            axes.set_axis_off()
            continue
        draw_map(axes, cells)
        axes.set_title(f"{arm}, seed {seed}", fontsize=8)
    figure.supxlabel("tokens of the document", fontsize=8)
    figure.supylabel("depth of what is asked for", fontsize=8)
    figure.suptitle(
        f"{task}: answers that are right (hatched: beyond the stacked windows)", fontsize=9
    )
    make_folder(path.parent)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
