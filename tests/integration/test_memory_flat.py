"""A run's memory does not grow with its steps, with a save at every step and every option on.

Bound: the resident set after step 1,000 is within 2 % of that after step 300. What a step leaves
behind shows: one float tensor of the model's size a hundred steps would be several times as much.
Fragmentation of the allocator, which settles in the first hundreds of steps, is what is left. The
numbers: ``-o log_cli=true``.
"""

import logging

import psutil
import pytest

from tests.helpers import tiny_config
from tests.integration.small_run import KillAfter, small_run, write_corpus
from train.build import build
from train.config.recovery import Anticipatory, RecoveryConfig
from train.config.schema import SampleConfig
from train.errors import ExitCode

log = logging.getLogger(__name__)
STEPS, EVERY, SETTLED = 1000, 100, 300


class MemoryEvery(KillAfter):
    """A tracker that notes the resident set, in bytes."""

    def __init__(self):
        super().__init__(0)
        self.found = {}

    def show(self, record):
        if record["step"] % EVERY == 0:
            self.found[record["step"]] = psutil.Process().memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_1000_steps_with_every_option_on(tmp_path):
    run = small_run(
        tmp_path / "run",
        write_corpus(tmp_path),
        steps=STEPS,
        eval_every=50,
        checkpoint_every=1,
        keep_checkpoints=2,
        keep_best_checkpoints=1,
        ema_decay=0.9,
        log_samples=True,
        async_checkpoint=True,
        recovery=RecoveryConfig(anticipatory=Anticipatory.always, anticipatory_lag=2),
    )
    run.model, run.tensorboard, run.sample = (
        tiny_config(vocab_size=260),
        True,
        SampleConfig(tokens=0),
    )
    trainer = build(run)
    memory = MemoryEvery()
    trainer.recorder.trackers.append(memory)
    logging.disable(logging.INFO)  # pytest keeps every line
    try:
        assert trainer.fit() == ExitCode.finished
    finally:
        logging.disable(logging.NOTSET)
    log.warning("MB after step: %s", {n: round(b / 1e6, 1) for n, b in memory.found.items()})
    assert memory.found[STEPS] < 1.02 * memory.found[SETTLED]
