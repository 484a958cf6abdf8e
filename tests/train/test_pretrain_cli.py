"""The entry from outside: any working directory, ``+model``, help, multirun, exit codes."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ErrorHandler,
    ProcessFailure,
)

import train.build
from parallel.launch import forget_absent_backend
from tests.studies.folders import leave_run
from train.config.command_line import compose_run, normalise
from train.config.sweep import place_of_sweep, sweep_folders
from train.errors import ROOT, USER_ERRORS, ExitCode
from train.pretrain import _train, cli
from train.recovery.stop import Stopped

ENTRY = ROOT / "train" / "pretrain.py"
SHORT = [
    "model=v4_tiny",
    "train.steps=2",
    "train.eval_tokens=256",
    "sample.tokens=4",
    # A real text that every machine has, small enough to prepare at once.
    "data.sources.mine.kind=text",
    f"data.sources.mine.path={argparse.__file__}",
    "data.sources.mine.unit=paragraph",
    "data.validation.bytes=4000",
]


def start(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ENTRY), *args], cwd=cwd, capture_output=True, text=True, check=False
    )


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_run_starts_from_any_folder_and_again_does_nothing_more(tmp_path):
    first = start(*SHORT, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert steps(tmp_path / "runs" / "v4_tiny") == [1, 2]
    again = cli([*SHORT, f"run_dir={tmp_path}/runs/v4_tiny"])
    assert again == ExitCode.finished
    assert steps(tmp_path / "runs" / "v4_tiny") == [1, 2]


def test_multirun_gives_each_job_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [*SHORT, "-m", "optim=muon,adamw", "run_dir=study"]
    assert cli(args) == ExitCode.finished
    for name in ("muon", "adamw"):
        assert steps(tmp_path / "study" / f"optim={name}") == [1, 2]
    assert not GlobalHydra.instance().is_initialized()


def test_a_sweep_lies_in_the_folder_that_was_named(tmp_path, monkeypatch, capsys):
    """One that is not named has a folder beside that of a single run; a run's own is refused."""
    args = ["model=v4_tiny", "seed=0,1"]
    assert place_of_sweep(["-m", *args, "run_dir=study"]).folder == Path("study")
    assert place_of_sweep(["-m", *args, "run_dir=a,b"]).folder == Path("runs/v4_tiny_sweep")
    assert place_of_sweep(["-m", *args]).folder == Path("runs/v4_tiny_sweep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    monkeypatch.chdir(tmp_path)
    assert cli(["-m", *args, "run_dir=run"]) == ExitCode.user_error
    assert capsys.readouterr().err == (
        "error: run_dir=run is a run's own folder (it holds config.yaml): name another one for the"
        " runs of a sweep\n"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_multirun_goes_on_after_a_bad_job_and_tells(tmp_path, monkeypatch, capsys):
    """Bad in a way that shows when its text is read; what a config tells is refused before all."""
    monkeypatch.chdir(tmp_path)
    args = [*SHORT, "-m", "data.validation.max_fraction=1e-6,0.5", "run_dir=study"]
    assert cli(args) == ExitCode.user_error
    assert "more than data.validation.max_fraction=1e-06" in capsys.readouterr().err
    assert steps(tmp_path / "study" / "data.validation.max_fraction=0.5") == [1, 2]


def test_another_rank_makes_no_folder_before_rank_0_lets_it(tmp_path, monkeypatch):
    """Rank 0 may refuse the run and take its folder away; the launcher ends the others there."""

    def waits(run):
        assert not folder.exists()
        raise Stopped

    folder = tmp_path / "run"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train.build, "join_ranks", waits)
    with pytest.raises(Stopped):
        _train(compose_run(["model=v4_tiny", f"run_dir={folder}"]), None)
    assert not folder.exists()


@pytest.mark.skipif(
    find_spec("matplotlib_inline") is not None, reason="a notebook's module is here"
)
@pytest.mark.parametrize("forgotten", [True, False])
def test_a_notebooks_backend_that_is_not_here_does_no_harm(forgotten):
    """As ``!v4 ...`` in a cell: the kernel's environment may be another than the command's."""
    words = "from parallel.launch import forget_absent_backend as f; f(); " if forgotten else ""
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(
        [sys.executable, "-c", f"{words}import train.record.plots"],
        cwd=ROOT, env={**os.environ, **backend}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == forgotten, done.stderr


@pytest.mark.parametrize(
    ("backend", "stays"),
    [("module://", False), ("module://.x", False), ("module://none.x", False),
     ("module://matplotlib.backends.backend_agg", True), ("agg", True)],
)  # fmt: skip
def test_only_a_backend_that_is_not_here_is_forgotten(backend, stays, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", backend)
    forget_absent_backend()
    assert os.environ.get("MPLBACKEND") == (backend if stays else None)


@pytest.mark.core
def test_help_shows_groups_keys_and_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli(["--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("model: v4_flash", "optim: adamw, muon", "train.steps=", "-m optim=muon,adamw"):
        assert text in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.core
def test_cfg_shows_the_whole_config_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli(["+model=v4_tiny", "--cfg", "job"]) == 0
    assert "hidden_size: 64" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_is_gone_is_no_problem_of_a_folder(monkeypatch):
    """As behind ``| head -1``: the command ends without a word."""

    def write(_):
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", write)
    with pytest.raises(BrokenPipeError):
        cli(["--cfg", "all"])


class Stub:
    """A trainer that ends as told."""

    def __init__(self, outcome, signalled=False):
        self.outcome, self.stop = outcome, SimpleNamespace(signalled=signalled)

    def fit(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize("code", list(ExitCode))
def test_exit_code_of_the_trainer_is_that_of_the_process(code, tmp_path, monkeypatch):
    monkeypatch.setattr(train.build, "build", lambda run, precision: Stub(code))
    assert cli(["model=v4_tiny", f"run_dir={tmp_path}"]) == code


def test_fault_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    """Only a ConfigError or UserError is the user's."""
    monkeypatch.setattr(
        train.build, "build", lambda run, precision: Stub(ValueError("shape mismatch"))
    )
    with pytest.raises(ValueError, match="shape mismatch"):
        cli(["model=v4_tiny", f"run_dir={tmp_path}"])


def test_interrupt_before_the_first_step_is_resumable(tmp_path, monkeypatch, capsys):
    def interrupt(run, precision):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.build, "build", interrupt)
    assert cli(["model=v4_tiny", f"run_dir={tmp_path}"]) == ExitCode.resumable
    assert "same command" in capsys.readouterr().err


@pytest.mark.parametrize("code", [ExitCode.finished, ExitCode.resumable])
def test_a_signal_behind_the_last_step_leaves_the_run_finished(code, tmp_path, monkeypatch):
    monkeypatch.setattr(train.build, "build", lambda run, precision: Stub(code, signalled=True))
    assert cli(["model=v4_tiny", f"run_dir={tmp_path}"]) == code


def test_signal_ends_the_jobs_of_a_sweep_that_follow(tmp_path, monkeypatch):
    begun = []

    def build(run, precision):
        begun.append(run.seed)
        return Stub(ExitCode.resumable, signalled=run.seed == 1)

    monkeypatch.setattr(train.build, "build", build)
    args = ["-m", "model=v4_tiny", "seed=0,1,2", f"run_dir={tmp_path}/study"]
    assert cli(args) == ExitCode.resumable
    assert begun == [0, 1]


def test_sweep_ends_with_its_ranking(tmp_path, monkeypatch, caplog):
    """Jobs of two learning rates and two seeds, each of which leaves a run with a known loss."""
    caplog.set_level("INFO")

    def build(run, precision):
        folder = leave_run(Path(run.run_dir) / "left", run, {5: 1000 * run.optim.lr + run.seed})
        for path in folder.iterdir():
            path.rename(folder.parent / path.name)
        folder.rmdir()
        return Stub(ExitCode.finished)

    monkeypatch.setattr(train.build, "build", build)
    args = ["-m", "model=v4_tiny", "optim.lr=0.004,0.002", "seed=0,1", f"run_dir={tmp_path}/study"]
    assert cli(args) == ExitCode.finished
    assert caplog.messages[-4:] == [
        "ranking by val_bits_per_byte:",
        "  1. 1.2500 (1.0000 to 1.5000) [2 seeds, finished]  optim.lr=0.002",
        "  2. 2.2500 (2.0000 to 2.5000) [2 seeds, finished]  optim.lr=0.004",
        f"v4 report {tmp_path}/study compares them",
    ]
    assert f"sweep: its runs lie in {tmp_path}/study, one folder each" in caplog.messages
    assert [f.name for f in sweep_folders(normalise(args))] == [
        f"optim.lr={lr},seed={seed}" for lr in ("0.002", "0.004") for seed in (0, 1)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_right_after_the_start_is_resumable(tmp_path, number):
    """As soon as the process catches the signal at all: long before anything is imported."""
    process = subprocess.Popen(
        [sys.executable, str(ENTRY), *SHORT], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not catches(process.pid, number):
        assert process.poll() is None
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == ExitCode.resumable, told
    assert told == f"{number.name}: stopped, no step was running; the same command goes on\n"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 3, 5, 8])
def test_signal_at_any_time_of_the_start_is_resumable(tmp_path, seconds):
    process = subprocess.Popen([sys.executable, str(ENTRY), *SHORT[:1]], cwd=tmp_path)
    time.sleep(seconds)
    process.terminate()
    assert process.wait(120) == ExitCode.resumable


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    # Python itself catches SIGINT from its start on; ours is there when SIGTERM's is.
    return bool(caught >> (signal.SIGTERM - 1) & 1) and bool(caught >> (number - 1) & 1)


@pytest.mark.core
def test_error_raised_inside_a_library_is_not_the_users():
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert not isinstance(caught.value, USER_ERRORS)


def test_a_size_without_its_recipe_is_told(tmp_path, monkeypatch, caplog):
    """Its batch, schedule and learning rate are then those of no size."""
    monkeypatch.setattr("train.pretrain.main", lambda cfg, words: ExitCode.finished)
    monkeypatch.setattr("train.pretrain.options", lambda group: ["v4_nano"])
    for model, told in (("v4_nano", 0), ("v4_tiny", 1)):
        caplog.clear()
        assert cli([f"model={model}", f"run_dir={tmp_path}/run"]) == ExitCode.finished
        lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(lines) == told
        assert all("conf/train/v4_tiny.yaml is not there" in line for line in lines)


def test_torchruns_report_ends_with_our_lines_and_says_nothing_of_its_own(
    tmp_path, monkeypatch, caplog
):
    """Read by torch's own code, as its launcher does for a process that has left with 2."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert cli(["model=v4_tiny", "train.steps=x", "optim.lr=y"]) == ExitCode.user_error
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=2, error_file=str(path))
    told = str(ChildFailedError("train/pretrain.py", {0: failure}))
    assert "error: train.steps=x" in told.splitlines()[-3]
    assert "error: optim.lr=y" in told.splitlines()[-2]
    ErrorHandler().override_error_code_in_rootcause_data(str(path), failure.error_file_data, 2)
    assert caplog.records == []
