"""Where a run begins: at its newest whole checkpoint, at another's weights, or at the start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checkpoint.manager import Checkpoints, hold, read_held
from train.checkpoint.state import RunState, as_written
from train.config.schema import RunConfig
from train.errors import UserError
from train.run_folder.identity import RunIdentity, Use
from train.run_folder.origin import check_origin, check_steps
from train.stages import resolve

log = logging.getLogger(__name__)
Restored = tuple[RunIdentity, Mapping[str, Any]]


def restore(
    run: RunConfig, asked: RunIdentity, state: RunState, checkpoints: Checkpoints
) -> Restored:
    """Bring a state to where the run's newest complete checkpoint left it, or to the start.

    Args:
        run: the config.
        asked: what the run is asked to be now.
        state: is filled.
        checkpoints: of its folder.

    Returns:
        What the run is, and what its trackers gave to the checkpoint.

    Raises:
        UserError: every checkpoint is damaged, or it is another run's or model's.
    """
    tokenizer, where = state.loader.tokenizer, f"run_dir={run.run_dir}"

    def resume(folder: Path) -> Restored:
        recorded = check_origin(Use.resume, folder, asked, where, run, tokenizer)
        saved = state.load(folder)
        check_steps(resolve(run).steps, state.progress.step, run.run_dir)
        with as_written(folder):
            return asked.continuing(recorded), saved.get("trackers", {})

    def evaluate(folder: Path) -> Restored:  # maybe in the folder of a run that is training
        recorded = check_origin(Use.evaluate, folder, asked, where, run, tokenizer)
        saved = state.load_evaluated(folder, run.train.weights)
        with as_written(folder):
            return asked.continuing(recorded), saved.get("trackers", {})

    if not run.train.eval_only:
        checkpoints.clean()
    restored = read_held(checkpoints.hold_newest, evaluate if run.train.eval_only else resume)
    if restored is not None:
        log.info("resuming after step %d", state.progress.step)
    elif found := checkpoints.published():
        raise UserError(
            f"run_dir={run.run_dir}: none of its {len(found)} checkpoints is whole (see the"
            " log); move them away to start again"
        )
    elif run.init_from:
        _start_from(run, asked, state)
    identity, trackers = restored or (asked, {})
    state.identity = identity.as_json()
    return identity, trackers


def _start_from(run: RunConfig, asked: RunIdentity, state: RunState) -> None:
    """Take weights, expert biases and hash tables from elsewhere; the optimizer starts fresh."""
    where, weights = f"init_from={run.init_from}", run.train.weights

    def load(folder: Path) -> None:
        recorded = check_origin(Use.init_from, folder, asked, where, run, state.loader.tokenizer)
        if recorded.tokenizer is None and state.engine.rank == 0:
            log.warning("%s does not say with which tokenizer it was trained", where)
        state.load_weights(folder, weights)
        log.info("starting from the %s weights of %s", weights.value, folder)

    read_held(lambda: hold(run.init_from), load)
    if state.average is not None:
        state.average.restart()
