"""Whether a run may use its folder: it is new, or holds an earlier part of the same run.

What the folder's run is stands in ``identity.json`` (identity.py), its config besides in
``config.yaml``, its tokenizer in ``tokenizer.json``, so that a model can leave the folder when its
text has changed; all are replaced whole or not at all. Checking looks and refuses; it makes the
folder, but the trainer fills it, once everything is known to be buildable.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from data.tokenizer import Tokenizer
from train.checkpoint.files import STATE, replace_durably, seal, step_of
from train.config.flat import flat_config, flatten
from train.config.load import load
from train.config.schema import RunConfig
from train.errors import UserError, one_line
from train.run_folder.identity import RunIdentity, Use, check

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
SAMPLES, ABANDONED = "samples.jsonl", "samples_abandoned.jsonl"
IDENTITY = "identity.json"
TOKENIZER = "tokenizer.json"  # as Tokenizer.serialise writes it
LOCK = ".lock"
PROBE = ".probe_"  # begin of the names of files that live for a moment


def check_run_folder(run: RunConfig, tell: bool = True) -> None:
    """Refuse a folder that belongs to another run.

    Compares what is known before data is read; the rest follows when it is (origin.py).

    Args:
        run: the config.
        tell: whether to log what differs and may.

    Raises:
        UserError: names ``run_dir`` and, where a config differs, the key and both values.
    """
    folder = Path(run.run_dir)
    if run.train.eval_only and not run.init_from and not _checkpoints(folder):
        raise UserError(
            f"train.eval_only=true has nothing to evaluate: run_dir={folder} holds no checkpoint"
            " and init_from names none"
        )
    found = _content(folder)
    if not found:
        return
    if CONFIG not in found:
        if _has_run(folder):
            raise UserError(f"run_dir={folder} holds a run but its {CONFIG} is missing")
        raise UserError(f"run_dir={folder} is no run folder: it holds {found[0]} but no {CONFIG}")
    if not _has_run(folder):
        return
    use = Use.evaluate if run.train.eval_only else Use.resume
    now, done = RunIdentity(config=flat_config(run)), _done_tokens(folder)
    # Where there is a checkpoint, its own record is compared too, and then told of.
    check(use, read_identity(folder), now, f"run_dir={folder}", done, tell=tell and not done)


def read_run(folder: Path) -> RunConfig:
    """The config of a run.

    Raises:
        UserError: the folder holds none, or one that this code does not take.
    """
    read_identity(folder)
    return load(OmegaConf.create(_read_config(folder / CONFIG)))


def read_identity(folder: Path) -> RunIdentity:
    """The record of a folder's run; of one that older code began, its config.

    Raises:
        UserError: a file is damaged; names it.
    """
    config, path = read_flat_config(folder / CONFIG), folder / IDENTITY
    if not path.exists():
        return RunIdentity(config=config)
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        intact = isinstance(content, dict) and seal(content) == text
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not intact:
        raise UserError(f"{path} ({len(text)} characters) is not what was written")
    identity = RunIdentity.from_json(content, str(path))
    if lost := [key for key in identity.config or {} if key not in config]:
        raise UserError(
            f"{folder / CONFIG} is damaged: it lacks {lost[0]}, which {path.name} has ({len(lost)}"
            " keys)"
        )
    return identity


def write_identity(
    folder: Path, identity: RunIdentity, config_yaml: str, tokenizer: Tokenizer
) -> None:
    """Write the config, the tokenizer and the record of a folder's run.

    In this order: a folder with a config alone may be started in, one with a record alone may not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_durably(folder / CONFIG, config_yaml)
    replace_durably(folder / TOKENIZER, tokenizer.serialise())
    replace_durably(folder / IDENTITY, seal(identity.as_json()))


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run: its files are not to be replaced by those of an evaluation."""
    return (folder / CONFIG).is_file() and _has_run(folder)


def read_flat_config(path: Path) -> dict[str, Any]:
    """A config file by dotted keys.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    return flatten(_read_config(path))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict) or not content:
        what = "nothing" if not content else f"a {type(content).__name__}"
        raise UserError(f"{path} is damaged: it holds {what}, not a config")
    return {str(key): value for key, value in content.items()}


def _passing(name: str) -> bool:
    """Whether a file is no part of a run: it is a process's, or half written at a kill."""
    half_written = name.startswith(".") and name.endswith(".writing")
    return half_written or name.startswith((LOCK, PROBE, ".nfs"))


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first."""
    if not (folder / CHECKPOINTS).is_dir():
        return []
    found = [path for path in (folder / CHECKPOINTS).iterdir() if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def _done_tokens(folder: Path) -> int:
    """Position of the newest checkpoint, which may turn out to be damaged; 0: there is none."""
    for path in _checkpoints(folder):
        try:
            return int(json.loads((path / STATE).read_bytes())["progress"]["tokens"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
    return 0


def _has_run(folder: Path) -> bool:
    """Whether there is anything to lose: a metrics line or a checkpoint."""
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    if metrics.is_file() and metrics.stat().st_size > 0:
        return True
    return bool(_content(checkpoints))


def _content(folder: Path) -> list[str]:
    """Names in a folder, but those of files that come and go with processes."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not _passing(path.name))


@contextmanager
def untouched_if_refused(run_dir: str, always: bool = False) -> Iterator[None]:
    """Folders made for a run that was then refused go again, as far as they are empty.

    Args:
        run_dir: of the run.
        always: they go although nothing was refused.
    """
    folder, new = Path(run_dir).absolute(), list[Path]()
    with contextlib.suppress(OSError):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
    refused = True  # or stopped, or failed: what is empty goes
    try:
        yield
        refused = always
    finally:
        if refused:
            with contextlib.suppress(OSError):
                for path in new:
                    path.rmdir()


def make_writable(folder: Path) -> None:
    """Make a run folder where there is none.

    Raises:
        UserError: it cannot be made, or not be written.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise UserError(f"run_dir={folder} cannot be: {existing} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=PROBE):
            pass
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {one_line(error)}") from error
