"""Entry: ``python train/pretrain.py [GROUP=OPTION ...] [KEY=VALUE ...]``, also under torchrun.

``cli`` reads the command line with Hydra, ``main`` is one run. An exit code is the contract
(reference P.1): 0 finished, 2 input that cannot be (one line, from rank 0 only), 75 stopped early
and resumable, 1 anything else.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: the repository root, not train/, must be first
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if Path(p).resolve() != _here)]
    from train.recovery.stop import leave_on_signal

    leave_on_signal()  # a signal during the imports below is answered too
    faulthandler.enable()  # a crash of native code says where Python was

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from data.cache import raise_if_full
from data.errors import DiskError
from parallel.last_word import tell_launcher
from parallel.launch import (
    check_launch,
    forget_absent_backend,
    launched_rank,
    launched_world_size,
    without_local_rank,
)
from train.config.command_line import (
    CONF,
    acceptable,
    composed,
    composition_errors,
    normalise,
    options,
    shows_only,
    sweeps,
)
from train.config.gathered import all_problems
from train.config.load import parse
from train.config.schema import RunConfig
from train.config.sweep import (
    forget_refused,
    in_own_folder,
    place_of_sweep,
    refuse_jobs,
    sweep_folders,
)
from train.errors import (
    FAILURES,
    USER_ERRORS,
    DoesNotFitError,
    ExitCode,
    UserError,
    ends_when_unread,
    lines_of,
    one_line,
)
from train.preflight.reach import tell_reach
from train.recovery.stop import Stopped, stop_with_launcher
from train.run_folder.folder import (
    CONFIG,
    check_run_folder,
    make_writable,
    untouched_if_refused,
)
from train.stages import resolve
from train.terminal import log_to_stderr, wrapped

if TYPE_CHECKING:
    from train.preflight.precision import PrecisionChoice
    from train.record.ranking import RunSummary

log = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds that a rank with a user error waits for rank 0 to have told it


def main(cfg: DictConfig, words: Sequence[str] = ()) -> int:
    """One run: config, plan, fit check, then build and train.

    Args:
        cfg: as Hydra composed it.
        words: the overrides that it was composed of, where it is the only run of the command line.

    Returns:
        An :class:`ExitCode`.

    Raises:
        ValueError: the input cannot be; nothing was written.
        Stopped: a signal ended it; it is saved.
    """
    from train.preflight.checks import check_run  # noqa: PLC0415  torch takes seconds

    with _told_with_all_others(words):
        run = parse(cfg)
    with untouched_if_refused(run.run_dir, always=run.dry_run):
        with _told_with_all_others(words):
            run, precision = check_run(run)
        tell_reach(run, resolve(run))
        return _dry_run(run) if run.dry_run else _train(run, precision)


def _train(run: RunConfig, precision: PrecisionChoice | None) -> int:
    folder = Path(run.run_dir)
    if not launched_rank():
        make_writable(folder)
    from model.kernels.allocator import keep_freed_memory  # noqa: PLC0415
    from parallel.lost_rank import lost_rank_ends_the_job  # noqa: PLC0415
    from train.build import build, build_checkpoints, join_ranks  # noqa: PLC0415
    from train.run_folder.finished import is_finished  # noqa: PLC0415
    from train.run_folder.lock import owned  # noqa: PLC0415

    keep_freed_memory()
    with lost_rank_ends_the_job(run.parallel.timeout_seconds), _told_by_the_rank_it_meets():
        join_ranks(run)
        make_writable(folder)  # on other ranks not before: rank 0 may refuse the run
        # An evaluation reads, maybe in the folder of a run that is training.
        with nullcontext() if run.train.eval_only else owned(folder):
            check_run_folder(run)
            if is_finished(run, resolve(run), build_checkpoints(run)):
                return ExitCode.finished
            with _told_if_full(folder):
                trainer = build(run, precision)
                code = trainer.fit()
    if trainer.stop.signalled:
        raise Stopped(code)
    return code


@contextmanager
def _told_by_the_rank_it_meets() -> Iterator[None]:
    """An error that not all ranks meet ends the job: the others wait in a collective."""
    import torch.distributed as dist  # noqa: PLC0415

    from parallel.lost_rank import all_meet_an_error, leave_by_own_error  # noqa: PLC0415
    from train.recovery.memory import OutOfMemoryError  # noqa: PLC0415

    try:
        yield
    except (*USER_ERRORS, *FAILURES) as error:
        if launched_world_size() == 1 or not dist.is_initialized():
            raise
        if not isinstance(error, OutOfMemoryError) and all_meet_an_error():
            raise
        leave_by_own_error(*_told(error))


@contextmanager
def _told_if_full(folder: Path) -> Iterator[None]:
    """Tell in one line of a disk that fails under metrics or samples; a save survives it."""
    try:
        yield
    except (*USER_ERRORS, DiskError):  # names the disk and its key already
        raise
    except Exception as error:
        raise_if_full(error, folder, "run_dir", or_read_only=True)
        raise


def _dry_run(run: RunConfig) -> int:
    """All that a start checks and tells before it makes a model.

    All ranks look at the folder together; the rest is told by rank 0 alone.
    """
    from train.build import build_checkpoints, build_data, foretell, join_ranks  # noqa: PLC0415
    from train.run_folder.finished import is_finished  # noqa: PLC0415

    join_ranks(run)
    plan, asked = resolve(run), replace(run, dry_run=False)
    if is_finished(asked, plan, build_checkpoints(run)) or launched_rank():
        return ExitCode.finished
    foretell(run, plan, build_data(run))
    log.info("dry_run=true: nothing was trained; what was read of the text is kept in its cache")
    return ExitCode.finished


def cli(args: Sequence[str]) -> int:
    """Run what a command line asks for, several jobs in turn under ``-m``.

    Args:
        args: the command line without the program.

    Returns:
        The exit code; of several jobs the worst (1 before 2 before 75 before 0).
    """
    codes: list[int] = []
    folders: list[Path] = []
    untold: list[str] = []
    pid = os.getpid()
    try:
        check_launch()
        args = without_local_rank(args)
    except USER_ERRORS as error:  # said by every process: none of them knows its number
        _print(lines_of(error))
        return ExitCode.user_error

    def job(cfg: DictConfig) -> None:
        choices = HydraConfig.get().runtime.choices
        if launched_rank() == 0 and choices.get("train") not in options("train"):
            log.warning(
                "conf/train/%s.yaml is not there: batch, schedule and learning rate are the"
                " defaults of train/config/schema.py, which fit no size; give them, or train=NAME"
                " of a size like it",
                choices.get("train"),
            )
        words = [] if sweeps(args) else acceptable(args)
        code = _guarded(lambda: main(own(cfg), words), untold)
        codes.append(code)
        if os.getpid() != pid and code:  # a launcher's worker process: the list stays behind
            raise RuntimeError(f"job {HydraConfig.get().job.override_dirname} left with {code}")

    def own(cfg: DictConfig) -> DictConfig:
        cfg = in_own_folder(cfg, sys.argv[1:])
        folders.append(Path(cfg.run_dir))
        return cfg

    def compose_and_run() -> int:
        with _told_with_all_others(args):
            words = normalise(args)
            _check_sweep(words)
            with _hydra_reads([sys.argv[0], *words]), composition_errors():
                with _own_folders(lambda: len(folders) > len(codes)):
                    main = hydra.main(
                        version_base=None, config_path=str(CONF), config_name="config"
                    )
                    main(job)()
        order = (ExitCode.failure, ExitCode.user_error, ExitCode.resumable)
        return next((code for code in order if code in codes), ExitCode.finished)

    try:
        code = _guarded(compose_and_run, untold)
    except Stopped as stopped:  # of a sweep, jobs are left
        code = ExitCode.resumable if sweeps(args) else ExitCode(stopped.code)
    if sweeps(args) and launched_rank() == 0 and set(codes) <= {ExitCode.user_error}:
        forget_refused(args)
    elif sweeps(args) and launched_rank() == 0:
        _tell_ranking(folders or sweep_folders(args))
    _let_rank_0_tell(untold)
    if "torch" in sys.modules:
        from parallel.mesh import leave_process_group  # noqa: PLC0415

        leave_process_group()
    return code


@contextmanager
def _told_with_all_others(words: Sequence[str]) -> Iterator[None]:
    """Refuse a command line with all that is wrong with it, where its first problem is met."""
    try:
        yield
    except USER_ERRORS as error:
        if launched_rank() or not words or sweeps(words):
            raise
        raise all_problems(error, words, acceptable(words), _check_alone) from error


def _check_alone(words: Sequence[str]) -> None:
    """Raise what is wrong with the run that some overrides describe; nothing is left behind."""
    _check_composed(composed(words))


def _check_composed(cfg: DictConfig, here: bool = True) -> None:
    from train.preflight.checks import check_run  # noqa: PLC0415  torch takes seconds

    run = parse(cfg)
    with untouched_if_refused(run.run_dir, always=True):
        check_run(run, alone=True, here=here)


def _check_sweep(args: Sequence[str]) -> None:
    """Refuse a sweep of which a job cannot be, before the first one trains.

    A run's own folder is refused too: it would hide the runs in it.
    """
    if not sweeps(args) or shows_only(args):
        return
    place = place_of_sweep(args)
    folder = place.folder
    if (folder / CONFIG).is_file():
        raise UserError(
            f"run_dir={folder} is a run's own folder (it holds {CONFIG}): name another one for the"
            " runs of a sweep"
        )
    refuse_jobs(args, folder, partial(_check_composed, here=place.here))


def _tell_ranking(folders: Sequence[Path]) -> None:
    """What a sweep's runs have reached, the best first."""
    from train.record.ranking import rank, ranking_lines, read_summary  # noqa: PLC0415

    try:
        runs = [read_summary(folder) for folder in folders if (folder / CONFIG).is_file()]
    except USER_ERRORS as error:
        log.warning("no ranking: %s", one_line(error))
        return
    if len(runs) > 1:
        for line in ranking_lines(rank(runs)):
            log.info("%s", line)
        log.info("v4 report %s compares them", " ".join(map(str, _parents(runs))))


def _parents(runs: Sequence[RunSummary]) -> list[Path]:
    """The folder of a sweep where its runs lie in one, else their own folders."""
    folders = [run.folder for run in runs]
    return [folders[0].parent] if len({f.parent for f in folders}) == 1 else folders


@contextmanager
def _own_folders(in_job: Callable[[], bool]) -> Iterator[None]:
    """Tell in one line of a folder that Hydra itself cannot make.

    Args:
        in_job: whether an error comes from a job.
    """
    try:
        yield
    except OSError as error:
        if in_job() or isinstance(error, HydraException | BrokenPipeError):
            raise
        raise UserError(f"hydra.run.dir or hydra.sweep.dir: {one_line(error)}") from error


@contextmanager
def _hydra_reads(argv: list[str]) -> Iterator[None]:
    """Let Hydra see ``argv``, raise its errors instead of printing them, and leave no trace."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _guarded(body: Callable[[], int], untold: list[str]) -> int:
    """Run ``body``; turn the user's errors into one line each and exit code 2.

    A run that was to stop at a failure, or met a full disk, gets one line too, and exit code 1.

    Rank 0 prints them; another rank adds them to ``untold``.
    """
    try:
        return int(body())
    except (*USER_ERRORS, *FAILURES) as error:
        lines, code = _told(error)
        before = error.table if isinstance(error, DoesNotFitError) else ""
    except Stopped:
        raise
    except SystemExit as left:  # Hydra's help and its parser of flags
        return int(left.code or 0)
    except KeyboardInterrupt:
        if launched_rank() == 0:
            _print(["interrupted; the same command goes on from the newest checkpoint"])
        raise Stopped from None
    if launched_rank() == 0:
        _print(lines, before)
    else:
        untold += lines
    return code


def _told(error: Exception) -> tuple[list[str], ExitCode]:
    """Lines and exit code of an error that needs no traceback."""
    if isinstance(error, FAILURES):
        return [one_line(error)], ExitCode.failure
    return lines_of(error), ExitCode.user_error


def _print(lines: Sequence[str], before: str = "") -> None:
    text = "".join(f"error: {line}\n" for line in lines)
    text = wrapped(text)
    sys.stderr.write(f"{before}\n\n{text}" if before else text)
    sys.stderr.flush()
    tell_launcher(text)


def _let_rank_0_tell(untold: list[str]) -> None:
    """On other ranks: wait until rank 0, which tells the user, has left; else tell him here.

    torchrun stops all ranks as soon as one has left, maybe before rank 0 has said anything. A rank
    that it stops in the wait leaves with the code of its own error. One that is still alive behind
    it met an error that rank 0 did not.
    """
    if untold:
        try:
            time.sleep(PATIENCE)
        except Stopped:
            return
        _print([f"rank {launched_rank()}: {line}" for line in untold])


def command(words: Sequence[str]) -> int:
    """The whole command in this process: what ``v4 pretrain`` and this file, run, do."""
    log_to_stderr(logging.INFO if launched_rank() == 0 else logging.WARNING, "%(message)s")
    stop_with_launcher()
    forget_absent_backend()
    return ends_when_unread(lambda: cli(words))


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
