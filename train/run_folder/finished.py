"""Whether a run has nothing left to do, and what would let it go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.collectives import same_everywhere
from train.checkpoint.files import step_of
from train.checkpoint.manager import Checkpoints, read_held
from train.config.flat import flat_config, pairs
from train.config.schema import RunConfig
from train.run_folder.folder import CONFIG, read_flat_config
from train.stages import StagePlan

log = logging.getLogger(__name__)
_RECEIPT = "receipt.json"


def is_finished(run: RunConfig, plan: StagePlan, checkpoints: Checkpoints) -> bool:
    """Whether the folder holds this run's last step, whole, and its results; says so. Collective.

    A run that is asked for something else than before (another prompt, more rows to evaluate) is
    told to be finished, and goes its way to the results that it lacks.

    Args:
        run: the config, for a folder that it may use.
        plan: its stages.
        checkpoints: of the folder.
    """
    folder = Path(run.run_dir)
    receipt = same_everywhere(_receipt(folder))
    if run.train.eval_only or receipt.get("finished") is not True:
        return False
    if read_held(checkpoints.hold_newest, step_of) != plan.steps:
        return False
    log.info("%s", finished_line(run, plan, receipt))
    before = same_everywhere(read_flat_config(folder / CONFIG))
    if changed := [key for key, a, b in pairs(before, flat_config(run)) if a != b]:
        log.info("it is evaluated once more, since %s changed", ", ".join(changed))
    return not changed


def finished_line(run: RunConfig, plan: StagePlan, receipt: Mapping[str, Any]) -> str:
    """What a finished run says when it is started again.

    Args:
        run: the config.
        plan: its stages.
        receipt: of the finished run.
    """
    if run.train.stages and plan.end_tokens >= plan.total_tokens:  # the plan is part of the run
        longer = f"init_from={run.run_dir} with stages of its own to another run_dir"
    else:
        longer = f"train.steps above {plan.steps}"
    validation = receipt.get("validation") or {}
    shown = [f"{k} {v:.5g}" for k, v in validation.items() if isinstance(v, float)][:2]
    return (
        f"run_dir={run.run_dir} is finished: step {plan.steps} of {plan.steps}"
        f"{''.join(f', {text}' for text in shown)}. To go on give {longer}; to begin another"
        " run, another run_dir; to evaluate it again, train.eval_only=true"
    )


def _receipt(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _RECEIPT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
