"""What counts as a failing step and what is decided about it.

Oracle: losses made for the purpose, and the deviation of a normal distribution.
"""

import math
import random
from dataclasses import replace

import pytest
import torch

from parallel.engine import Shares, Update
from tests.train.test_step import run_config, step_of
from train.config.command_line import compose_run
from train.config.recovery import RecoveryConfig, Remedy
from train.errors import UserError
from train.recovery.judge import Recovery, deviation
from train.step import StepResult

WINDOW = 8


def recovery(**changes):
    return Recovery(RecoveryConfig(window=WINDOW, **changes))


def feed(judge, losses, grad_norm=1.0, first=1):
    """Verdicts of steps with these losses; updates are applied as the engine would."""
    out, any_step = [], step_of(run_config(steps=1000))
    for number, loss in enumerate(losses, first):
        step = replace(any_step, number=number)
        shares = Shares(torch.tensor(loss), {"loss": torch.tensor(loss, dtype=torch.float64)})
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        applied = finite and judge.accepts(step, shares)
        out.append(judge.after(step, StepResult(shares, Update(grad_norm, applied))))
    return out


def remedies(verdicts):
    return [v.remedy.value for v in verdicts]


def noisy(count, level=2.0, fall=0.0, noise=0.05, seed=0):
    rng = random.Random(seed)
    return [level - fall * i + rng.gauss(0, noise) for i in range(count)]


@pytest.mark.parametrize("fall", [0.0, 0.02])
def test_deviation_is_that_of_the_noise_whether_or_not_the_loss_falls(fall):
    """Within 15 %: medians of 2000 normal values scatter by 3 %, neighbours are dependent."""
    assert deviation(noisy(2000, 50.0, fall, noise=2.0)) == pytest.approx(2.0, rel=0.15)


def test_equal_losses_have_a_deviation():
    assert deviation([2.0] * WINDOW) == pytest.approx(0.02)


def test_noise_and_falls_are_no_spikes():
    judge = recovery(on_spike=Remedy.stop, patience=1)
    feed(judge, noisy(200, 9.0, fall=0.03))
    assert judge.state.loss_spikes == 0


def test_rollback_waits_for_patience_and_names_the_first():
    judge = recovery(on_spike=Remedy.rollback, patience=3)
    feed(judge, noisy(20))
    window = judge.state.losses
    verdicts = feed(judge, [9.0, 9.0, 2.0, 9.0, 9.0, 9.0], first=21)
    assert remedies(verdicts) == ["none"] * 5 + ["rollback"]
    assert verdicts[-1].first_failed == 24
    assert judge.suspects
    assert judge.state.losses == [*window[1:], 2.0]  # spikes do not shift what is normal


def test_skip_refuses_the_update_at_once_and_ends_somewhere():
    judge = recovery(on_spike=Remedy.skip, max_skips=2)
    feed(judge, noisy(20))
    assert remedies(feed(judge, [9.0] * 3, first=21)) == ["skip", "skip", "stop"]
    assert "max_skips=2" in feed(judge, [9.0], first=24)[0].reason


def test_told_only_gets_used_to_a_new_level():
    judge = recovery(on_spike=Remedy.none)
    feed(judge, noisy(20))
    assert set(remedies(feed(judge, noisy(20, level=4.0), first=21))) == {"none"}
    assert 1 <= judge.state.loss_spikes <= WINDOW
    assert not judge.suspects


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)])
@pytest.mark.parametrize("remedy", [Remedy.skip, Remedy.rollback, Remedy.stop])
def test_what_is_not_finite_is_dealt_with_at_once(loss, grad_norm, remedy):
    judge = recovery(on_nonfinite=remedy)
    (verdict,) = feed(judge, [loss], grad_norm)
    assert (verdict.remedy, verdict.first_failed) == (remedy, 1)
    assert judge.state.losses == []
    assert judge.state.skips == 1


def test_rollbacks_are_counted_over_what_is_gone_back_to():
    judge = recovery(on_spike=Remedy.rollback, patience=1, max_rollbacks=2, anticipatory_steps=5)
    feed(judge, noisy(20))
    saved = judge.state_dict()
    for number in (1, 2):
        assert remedies(feed(judge, [9.0], first=21)) == ["rollback"]
        judge.roll_back(20, saved)
        assert judge.state.rollbacks == judge.state.loss_spikes == number
        assert [judge.anticipates(step) for step in (21, 25, 26)] == [True, True, False]
    (verdict,) = feed(judge, [9.0], first=21)
    assert verdict.remedy is Remedy.stop
    assert "max_rollbacks=2" in verdict.reason


def test_state_continues_to_the_bit():
    losses = [*noisy(30), 9.0, 2.0, 9.0, 9.0]
    whole, first = recovery(on_spike=Remedy.stop), recovery(on_spike=Remedy.stop)
    feed(whole, losses)
    feed(first, losses[:31])
    second = recovery(on_spike=Remedy.stop)
    second.load_state_dict(first.state_dict())
    feed(second, losses[31:], first=32)
    assert second.state == whole.state


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["on_nonfinite=none"], "train.recovery.on_nonfinite=none"),
        (["on_spike=rollback"], r"train\.checkpoint_every=0"),
        (["anticipatory_lag=0"], "anticipatory_lag=0 must be 1 or more"),
        (["threshold=0"], "threshold=0.0 must be above 0"),
        (["anticipatory=always", "pp"], r"parallel\.pp=2"),
    ],
)
def test_values_that_cannot_be_are_refused(words, message):
    words = ["parallel.pp=2" if w == "pp" else f"train.recovery.{w}" for w in words]
    with pytest.raises(UserError, match=message):
        compose_run(["model=v4_tiny", *words])
