"""Sweeps (``-m``): each job has a folder of its own, named by what differs between the jobs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from conf.problems import refuse
from train.config.command_line import (
    composed_as_hydra_reads,
    parse,
    sweep_folder,
)
from train.errors import USER_ERRORS, UserError, lines_of, one_line

log = logging.getLogger(__name__)

_LONGEST = 200  # bytes of a folder's name, of the 255 that file systems take
_RECORD = "multirun.yaml"  # Hydra's own record of a sweep
_HERE = ("basic", "joblib")  # Hydra's launchers whose jobs run on this machine


def in_own_folder(cfg: DictConfig, args: Sequence[str]) -> DictConfig:
    """The config of a job; of a sweep's job with the folder that is its own on every rank.

    Args:
        cfg: as Hydra composed it.
        args: the command line as :func:`train.config.command_line.normalise` returned it.
    """
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return cfg
    differing = swept(hydra_cfg.overrides.task, args)
    if differing and not any(o.startswith("run_dir=") for o in differing):
        cfg = cfg.copy()
        folder = Path(hydra_cfg.sweep.dir)
        if hydra_cfg.job.num == 0:
            log.info("sweep: its runs lie in %s, one folder each", folder)
        cfg.run_dir = str(folder / folder_name(differing))
    log.info("job %d: %s", hydra_cfg.job.num, cfg.run_dir)
    return cfg


def jobs(args: Sequence[str]) -> list[list[str]]:
    """Overrides of every job of a sweep, in Hydra's order; none where another sweeper chooses them.

    Args:
        args: the command line as :func:`train.config.command_line.normalise` returned it.
    """
    overrides = parse(args)
    if any(o.key_or_group.startswith(("hydra/sweeper", "hydra.sweeper")) for o in overrides):
        return []
    try:
        (batch,) = BasicSweeper.split_arguments(overrides, None)
    except HydraException as error:
        raise UserError(f"-m: {one_line(error)}") from error
    empty = (o for o in overrides if o.is_sweep_override() and not list(o.sweep_string_iterator()))
    refuse(UserError, (f"{o.input_line}: there is no such value, so no job" for o in empty))
    return batch


def refuse_jobs(args: Sequence[str], folder: Path, check: Callable[[DictConfig], object]) -> None:
    """Refuse a sweep of which a job cannot be.

    Args:
        args: the command line as :func:`train.config.command_line.normalise` returned it.
        folder: of the sweep.
        check: raises what is wrong with a job's config.

    Raises:
        UserError: a line a problem, with the jobs that have it, unless all do.
    """
    every, problems = jobs(args), dict[str, list[str]]()
    for number, words in enumerate(every):
        differing = swept(words, args)
        try:
            cfg = composed_as_hydra_reads(words)
            if differing and not any(word.startswith("run_dir=") for word in differing):
                cfg.run_dir = str(folder / folder_name(differing))
            check(cfg)
        except USER_ERRORS as error:
            for line in lines_of(error):
                problems.setdefault(line, []).append(f"job {number} ({', '.join(differing)})")
    refuse(
        UserError,
        (line if len(of) == len(every) else f"{_few(of)}: {line}" for line, of in problems.items()),
    )


def _few(jobs: Sequence[str]) -> str:
    return jobs[0] if len(jobs) == 1 else f"{jobs[0]} and {len(jobs) - 1} more"


def swept(task: Sequence[str], args: Sequence[str]) -> list[str]:
    """What a job of a sweep has that others have not, as ``key=value``.

    Args:
        task: the job's overrides.
        args: the command line as :func:`train.config.command_line.normalise` returned it.
    """
    asked = {o.key_or_group: o for o in parse(args)}
    out: list[str] = []
    for text, override in zip(task, parse(task), strict=True):
        key = override.key_or_group
        if key not in asked:  # of hydra.sweeper.params
            out.append(text)
        elif asked[key].is_sweep_override():
            out += _differing(text, override, asked[key])
    return out


def folder_name(differing: Sequence[str]) -> str:
    """Name of a job's folder; a long one ends in a hash of all of it."""
    name = ",".join(differing).replace("/", "_")
    encoded = name.encode()
    if len(encoded) <= _LONGEST:
        return name
    kept = encoded[: _LONGEST - 17].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(encoded).hexdigest()[:16]}"


def forget_refused(args: Sequence[str]) -> None:
    """Remove the folder of a sweep none of whose jobs began: it holds Hydra's record alone."""
    with contextlib.suppress(Exception):
        folder = place_of_sweep(args).folder
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [_RECORD]:
            (folder / _RECORD).unlink()
            folder.rmdir()


def sweep_folders(args: Sequence[str]) -> list[Path]:
    """Folders in that of a sweep, whose jobs other processes ran (a launcher's)."""
    folder = place_of_sweep(args).folder
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


@dataclass(frozen=True)
class SweepPlace:
    """Where the jobs of a sweep are.

    Attributes:
        folder: of their folders: ``run_dir`` if named, else its name_sweep.
        here: they run on this machine; else their launcher chooses another.
    """

    folder: Path
    here: bool


def place_of_sweep(args: Sequence[str]) -> SweepPlace:
    """Composed of what a sweep's jobs have in common, with Hydra's own section."""
    given = [o.input_line for o in parse(args) if o.input_line and not o.is_sweep_override()]
    hydra = composed_as_hydra_reads([*given, *sweep_folder(given)], with_hydra=True).hydra
    return SweepPlace(Path(hydra.sweep.dir), hydra.runtime.choices["hydra/launcher"] in _HERE)


def _differing(text: str, override: Override, asked: Override) -> list[str]:
    """Of a swept dict the leaves whose values differ between its choices."""
    value = override.value()
    if not isinstance(value, dict):
        return [text]
    dicts = [choice for choice in asked.sweep_iterator() if isinstance(choice, dict)]
    choices = [dict(_leaves(choice)) for choice in dicts]
    return [
        f"{override.key_or_group}.{key}={leaf}"
        for key, leaf in _leaves(value)
        if len({str(choice.get(key)) for choice in choices}) > 1
    ]


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
