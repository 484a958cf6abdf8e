"""Samples: what is judged of the updates of large models, and of all on a device."""

import math
import re
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch.utils._pytree import tree_flatten

from parallel import pieces
from tests.helpers import LiveBytes, small_config
from tests.integration.small_run import small_run
from tests.train.audit.audited import FEW, QAT, sampled, step
from train.audit import audit, samples
from train.audit.observer import Observer
from train.audit.orthogonal import most_asked_for
from train.audit.updates import root_sum_square
from train.build import build


def all_kinds(names):
    return {re.sub(r"\d+", "*", name) for name in names}


def test_steps_take_turns_at_the_kinds_of_matrices_and_say_which(tmp_path, corpus):
    with sampled():
        trainer = build(small_run(tmp_path / "run", corpus, steps=5, eval_every=0))
        for number in (1, 2, 3):
            step(trainer)
            told = trainer.audit.result()["judged"]
            matrices = [n for n, pieces in told.items() if "matrix" in pieces[0]]
            assert len(all_kinds(matrices)) == 8 * number
    names = {name for name, _ in trainer.engine.model.named_parameters()}
    spread = all_kinds(told) - all_kinds(matrices)
    of_muon = {n for n, record in trainer.audit._records.items() if record.owner == "muon"}
    assert spread == all_kinds(names - of_muon)
    [first, *others] = told["embed.weight"]
    assert re.fullmatch(r"every \d+th element from \d+", first)
    assert len(others) == 2
    [experts] = [n for n in told if n.endswith(".experts.w2.weight")][:1]
    assert re.fullmatch(r"matrix \d of 4", told[experts][0])


def test_matrices_of_a_long_warm_up_are_judged_when_their_update_shows(tmp_path, corpus):
    """At a rate of 1e-12 fp32 weights hide every update; the first steps leave 24 matrices."""
    with sampled():
        trainer = build(small_run(tmp_path / "run", corpus, steps=9, eval_every=0))
        rates = iter([1e-12] * 3 + [3e-3] * 6)
        with patch("train.step.learning_rate", lambda *_, **__: next(rates)):
            for _ in range(3):
                step(trainer)
            for number in (0, 8, 16, 24):
                told = trainer.audit.result()["judged"]
                assert sum("matrix" in pieces[0] for pieces in told.values()) == number
                step(trainer)
        assert trainer.audit.result()["steps"] == [1, 2, 3, 4, 5, 6]  # of seven


class Watched(LiveBytes):
    """Also the operations that had to do with float64."""

    def __init__(self):
        super().__init__()
        self.float64 = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        seen = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, torch.Tensor)]
        self.float64 += [str(func)] * any(t.dtype == torch.float64 for t in seen)
        return out


def test_audit_needs_no_float64_and_the_bytes_that_are_foreseen(tmp_path, corpus):
    """Each piece fits between the rest: chunks are made as small as this model's tensors."""
    run = small_run(tmp_path / "run", corpus, steps=5, eval_every=0)
    run.quant, run.model = QAT, small_config(vocab_size=260, hidden_size=128)
    size, watched = replace(FEW, matrix_bytes=150_000, elements=1000), Watched()

    def under_watch(function):
        def call(*args, **kwargs):
            with watched:
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(sampled(size))
        bound = most_asked_for(run.optim.muon)  # of the config, on the host
        stack.enter_context(patch("train.audit.updates.most_asked_for", lambda _: bound))
        stack.enter_context(patch.object(pieces, "_CHUNK", 1000))
        stack.enter_context(patch.object(samples, "FINGERPRINT_BYTES", 5 * 8 * 1000))
        trainer = build(run)
        for owner, name in (
            (Observer, "before_step"),
            (Observer, "after_backward"),
            (Observer, "after_update"),
            (audit.Audit, "_judge"),
        ):
            stack.enter_context(patch.object(owner, name, under_watch(getattr(owner, name))))
        for _ in range(2):
            step(trainer)
        records, weights = trainer.audit._records.values(), trainer.engine.weights().values()
        foreseen = samples.sample_bytes(records, size, sum(w.nbytes for w in weights))
    assert trainer.audit.result()["steps"] == [1, 2]
    assert watched.float64 == []
    assert foreseen / 3 < watched.most <= foreseen  # the eight largest never come in one step
    assert foreseen < sum(w.nbytes for w in weights) / 2


@pytest.mark.parametrize("kind", ["few", "spread"])
def test_norm_in_two_levels_holds_its_bound(kind):
    count = 3 if kind == "few" else 1_000_003
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = float(x.double().norm())
    assert abs(float(root_sum_square(x)) - exact) <= math.sqrt(count) * 2**-23 * exact
