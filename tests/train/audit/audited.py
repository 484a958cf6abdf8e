"""Runs of one audited step, for the tests of the audit."""

from unittest.mock import patch

from model.config import IndexerPhase
from quant.config import QuantConfig, Recipe
from tests.integration.small_run import small_run
from train.audit import audit
from train.audit.samples import SampleSize
from train.config.schema import ActivationCheckpoint, Precision

FEW = SampleSize(
    whole_bytes=0, matrices=8, matrix_bytes=1 << 28, elements=100
)  # of a parameter; on a device more
QAT = QuantConfig(recipe=Recipe.fp4_qat)


def one_step(folder, corpus, quant=None, **train):
    run = small_run(folder, corpus, steps=1, eval_every=0, **train)
    if quant is not None:
        run.quant = quant
    return run


def sampled(size=FEW):
    """The sizes of another device; what is judged is judged by the same code on each."""
    return patch.dict(audit.SAMPLE_SIZES, {"cpu": size})


def step(trainer):
    """One audited step, without what comes after the last one."""
    with trainer.stop:
        trainer._next_step()


RECOMPUTED = {"activation_checkpoint": ActivationCheckpoint.block}
BF16 = {"precision": Precision.bf16}
WARMUP = {"indexer_phase": IndexerPhase.warmup}
