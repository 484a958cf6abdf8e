"""The engine's own checkpoint folder beside ours (``engine.own_checkpoints``).

A run goes on from ours, which knows no layout. DeepSpeed's is for whoever works with its tools.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.engine import Engine
from train.checkpoint.files import step_of
from train.config.schema import RunConfig

OWN = "deepspeed"  # in the run's folder


def save_own(run: RunConfig, engine: Engine, step: int, kept: Collection[Path]) -> None:
    """Write it, if it is asked for; those without a checkpoint of ours go. Collective.

    Args:
        run: the config.
        engine: that has taken ``step``.
        step: that ends here.
        kept: checkpoints of ours.
    """
    if run.engine.own_checkpoints:
        assert isinstance(engine, DeepSpeedEngine)
        steps = {number for path in kept if (number := step_of(path)) is not None}
        engine.save_own(Path(run.run_dir) / OWN, step, steps)
