"""Look after checkpoints: list, verify, show, compare, prune.

  python scripts/checkpoints.py list runs/nano
  python scripts/checkpoints.py verify runs/nano runs/other/checkpoints/step_00000100
  python scripts/checkpoints.py show runs/nano
  python scripts/checkpoints.py compare runs/a runs/b --only model.
  python scripts/checkpoints.py prune runs/nano --last 2 --every 1000 --best 1 --yes

A run folder stands for its newest whole checkpoint, except for list, verify and prune, which take
all of them. Exit codes: 0 all is well (verify: nothing damaged; compare: equal bits), 1 it is not
(damage, a difference), 2 the input cannot be. Checkpoints hold pickles, which are read only after
their hashes verify: use only checkpoints of people whose code you would run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from scripts.cli.command import command, tell
from scripts.cli.parser import CommandParser, whole
from train.checkpoint import manager as checkpoint
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.files import MANIFEST, DamagedCheckpointError, open_manifest, step_of
from train.checkpoint.hold import Hold
from train.checkpoint.retention import Retention, published, remove
from train.errors import ExitCode, UserError, one_line
from train.run_folder.folder import CHECKPOINTS
from train.run_folder.lock import owned


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = parse(words)
    try:
        return args.run(args)
    except DamagedCheckpointError as error:
        return tell(error, ExitCode.failure)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    sub = add("list", list_run, "Steps, bytes and validation loss of a run's checkpoints.")
    sub.add_argument("folder", type=Path, help="run folder")
    sub = add("verify", verify, "Compare every file with the hashes that were written.")
    sub.add_argument("folders", type=Path, nargs="+", help="run folders or checkpoints")
    sub = add("show", show, "State and tensors of one checkpoint.")
    sub.add_argument("folder", type=Path, help="run folder or checkpoint")
    sub.add_argument("--only", default="", help="tensors whose names start so")
    sub = add("compare", compare, "Which tensors and which state of two checkpoints differ.")
    sub.add_argument("first", type=Path, help="run folder or checkpoint")
    sub.add_argument("second", type=Path, help="run folder or checkpoint")
    sub.add_argument("--only", default="", help="tensors whose names start so, and no state")
    sub = add("prune", prune, "Remove checkpoints; without --yes only say which.")
    sub.add_argument("folder", type=Path, help="run folder; nothing may be training in it")
    sub.add_argument(
        "--last", type=whole(least=1), required=True, help="how many of the newest whole ones stay"
    )
    sub.add_argument(
        "--every", type=whole(least=0), default=0, help="steps that are multiples stay"
    )
    sub.add_argument(
        "--best", type=whole(least=0), default=0, help="so many of lowest validation loss stay"
    )
    sub.add_argument("--yes", action="store_true", help="do it")
    return parser.parse_args(words)


# ---- commands ------------------------------------------------------------------------------------
def list_run(args: argparse.Namespace) -> int:
    """One line a checkpoint, oldest first; hashes are not compared."""
    paths = checkpoints_of(args.folder)
    print(f"{'step':>10} {'tokens':>14} {'MB':>10} {'val_loss':>9}  folder")
    for path in paths:
        try:
            info = read_info(path)
            loss = "" if info.val_loss is None else f"{info.val_loss:.4f}"
            print(f"{info.step:10} {info.tokens:14,} {info.megabytes:10.1f} {loss:>9}  {path}")
        except DamagedCheckpointError as error:
            if path.exists():  # else a run has pruned it in between
                print(f"{step_of(path):10} {'damaged':>14} {'':10} {'':9}  {error}")
    return ExitCode.finished


def verify(args: argparse.Namespace) -> int:
    """One line a checkpoint."""
    paths = [path for folder in args.folders for path in checkpoints_of(folder)]
    damaged = 0
    for path in paths:
        try:
            with Hold(path):
                checkpoint_reader.verify(path)
            print(f"whole    {path}")
        except DamagedCheckpointError as error:
            if path.exists() or path in args.folders:  # else a run has pruned it in between
                damaged += 1
                print(f"DAMAGED  {error}")
    return ExitCode.failure if damaged else ExitCode.finished


def show(args: argparse.Namespace) -> int:
    """State, then one line a tensor."""
    with hold(args.folder) as held:
        show_one(held.folder, args.only)
    return ExitCode.finished


def show_one(path: Path, only: str) -> None:
    """Print state and tensors of a checkpoint that is held."""
    state, chosen = checkpoint_reader.verify(path), named(path, only)
    print(f"{path}\n")
    for key, value in flat(state).items():
        print(f"{key} = {value}")
    print()
    for name, value in checkpoint_reader.load_each(path, chosen):
        norm = float(value.double().norm())
        print(f"{name:60} {dtype_of(value):9} {list(value.shape)!s:20} norm {norm:.6g}")
    print(f"{len(chosen)} tensors")


def compare(args: argparse.Namespace) -> int:
    """One line a difference."""
    with hold(args.first) as first, hold(args.second) as second:
        differences = compare_two(first.folder, second.folder, args.only)
    return ExitCode.failure if differences else ExitCode.finished


def compare_two(first: Path, second: Path, only: str) -> int:
    """Print what differs between two checkpoints that are held; how much it is."""
    states = [flat(checkpoint_reader.verify(path)) for path in (first, second)]
    names = [named(path, only) for path in (first, second)]
    print(f"a = {first}\nb = {second}\n")
    differences = 0 if only else compare_states(*states)
    for side, own, other in (("a", *names), ("b", *names[::-1])):
        for name in sorted(set(own) - set(other)):
            differences += 1
            print(f"{name}: only in {side}")
    shared = sorted(set(names[0]) & set(names[1]))
    pairs = zip(
        checkpoint_reader.load_each(first, shared),
        checkpoint_reader.load_each(second, shared),
        strict=True,
    )
    for (name, a), (_, b) in pairs:
        if line := difference(a, b):
            differences += 1
            print(f"{name}: {line}")
    found = f"{differences} differences" if differences else "every bit is the same"
    print(f"{len(shared)} tensors in both: {found}")
    return differences


def prune(args: argparse.Namespace) -> int:
    """Remove what no reason keeps; damaged ones stay, since somebody may want to look at them."""
    paths = checkpoints_of(args.folder)
    place = paths[0].parent
    run_folder = place.parent if place.name == CHECKPOINTS else place
    with owned(run_folder) if args.yes else nullcontext():
        stay = prune_alone(paths, Retention(args.last, args.every, args.best), args.yes)
    print(f"{stay} whole checkpoints stay" + ("" if args.yes else " (--yes does it)"))
    return ExitCode.finished


def prune_alone(paths: Sequence[Path], retention: Retention, remove_them: bool) -> int:
    """Remove, or only name, what has no reason to stay; how many whole ones are left."""
    whole = {}
    for path in paths:
        try:
            checkpoint_reader.verify(path)
            whole[step_of(path) or 0] = path
        except DamagedCheckpointError as error:
            print(f"left alone: {error}")
    losses = {step: read_info(path).val_loss for step, path in whole.items()}
    kept = retention.kept(losses, lambda step: True)
    for step in sorted(set(whole) - kept):
        if not remove_them:
            print(f"would remove {whole[step]}")
        elif remove_one(whole[step]):
            print(f"removed {whole[step]}")
        else:
            kept.add(step)
            print(f"being read, stays: {whole[step]}")
    return len(kept)


def remove_one(path: Path) -> bool:
    """Remove a checkpoint unless somebody holds it; whether it is gone.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        return remove(path)
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {one_line(error)}") from error


# ---- parts ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Info:
    """What a checkpoint says of itself, hashes not compared."""

    step: int
    tokens: int
    megabytes: float
    val_loss: float | None


def read_info(path: Path) -> Info:
    """Manifest and state of a checkpoint.

    Raises:
        DamagedCheckpointError: the manifest or the state is not what was written.
    """
    manifest = open_manifest(path)
    state = checkpoint_reader.read_state(path, manifest)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    tokens = state.get("progress", {}).get("tokens", 0)
    return Info(manifest["step"], tokens, size / 1e6, state.get("val_loss"))


def checkpoints_of(folder: Path) -> list[Path]:
    """All checkpoints of a run folder, or the one that ``folder`` is.

    Raises:
        UserError: there are none.
    """
    if (folder / MANIFEST).exists() or step_of(folder) is not None:
        return [folder]
    for place in (folder / CHECKPOINTS, folder):
        if found := published(place):
            return found
    raise UserError(f"{folder} is no checkpoint and holds none (step_* in {folder / CHECKPOINTS})")


def hold(folder: Path) -> Hold:
    """Hold the checkpoint that ``folder`` is, or its newest whole one."""
    if step_of(folder) is not None and folder.is_dir():
        return Hold(folder)
    return checkpoint.hold(str(folder), "the folder")


def named(path: Path, prefix: str) -> list[str]:
    """Names of a verified checkpoint's tensors.

    Raises:
        UserError: none starts with ``prefix``.
    """
    names = sorted(n for n in checkpoint_reader.saved_tensors(path) if n.startswith(prefix))
    if not names:
        raise UserError(f"--only {prefix}: no tensor of {path} has such a name")
    return names


def flat(values: object, key: str = "") -> dict[str, object]:
    """Nested dicts as dotted keys."""
    if not isinstance(values, dict):
        return {key: values}
    items = values.items()
    return {
        k: v for name, part in items for k, v in flat(part, f"{key}.{name}".lstrip(".")).items()
    }


def compare_states(a: dict[str, object], b: dict[str, object]) -> int:
    """Print the keys that differ; how many."""
    keys = sorted(k for k in {*a, *b} if k not in a or k not in b or a[k] != b[k])
    for key in keys:
        print(f"state {key}: {a.get(key, 'absent')} | {b.get(key, 'absent')}")
    return len(keys)


def difference(a: Tensor, b: Tensor) -> str:
    """What differs between two tensors; empty where every bit is the same."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{dtype_of(a)} {list(a.shape)} | {dtype_of(b)} {list(b.shape)}"
    if torch.equal(a, b):
        return ""
    x, y = a.double(), b.double()
    gap = (x - y).abs()
    relative = float((x - y).norm() / y.norm().clamp(min=1e-300))
    return (
        f"max difference {float(gap.max()):.3g}, relative {relative:.3g},"
        f" {int((a != b).sum())} of {a.numel()} elements"
    )


def dtype_of(tensor: Tensor) -> str:
    """Short name of a dtype."""
    return str(tensor.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
