"""What a run asks for and never comes to is refused, or told in one line with both values."""

import logging
import re

import pytest

from tests.integration.small_run import fit, small_run, write_corpus
from train.config.command_line import compose_run
from train.errors import USER_ERRORS
from train.preflight.reach import check_reach, never, tell_reach, warnings
from train.stages import resolve
from train.step import plan_step

RAMP = (
    "train.stages=[{until_tokens: 5120, ramp_from_tokens: 128, ramp_tokens: 5120},"
    "{until_tokens: 10240}]"
)


@pytest.mark.core
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["optim.schedule.decay_start_tokens=10240"], "decay_start_tokens=10240 .* 10240 tokens"),
        (["train.profile_steps=2", "train.profile_start=20"], "profile_steps=2 .* 20 steps"),
        (
            ["train.recovery.anticipatory=always", "train.recovery.anticipatory_lag=20"],
            "anticipatory_lag=20 leaves no step of the run's 20",
        ),
        ([RAMP], "ramp_tokens=5120 must be below the stage's 5120 tokens"),
        (["train.keep_checkpoints_every=4"], "keep_checkpoints_every=4 .*checkpoint_every=0"),
        (["train.bias_stops_at_decay=true", "optim.schedule.kind=constant"], "kind=constant"),
        (["train.recovery.skip_steps=2"], "skip_steps=2 acts after a rollback"),
    ],
)
def test_what_cannot_happen_is_refused(args, message):
    def start() -> None:
        run = compose_run(["model=v4_tiny", *args])
        check_reach(run, resolve(run))

    with pytest.raises(USER_ERRORS, match=message):
        start()


@pytest.mark.core
@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], None),
        (["optim.schedule.warmup_steps=6"], None),
        (
            ["optim.schedule.warmup_steps=1000", "train.steps=4"],
            "warmup_steps=1000 takes more than a third of the run's 4 steps: the learning rate"
            " reaches 9e-06 of optim.lr=0.003 at most",
        ),
        (
            ["optim.schedule.warmup_steps=8"],
            "warmup_steps=8 takes more than a third of the run's 20 steps: the learning rate"
            " reaches optim.lr=0.003 at step 8 only",
        ),
        (["train.recovery.on_spike=skip"], "on_spike=skip never acts: .*window=64 .* than 20"),
        (["train.recovery.on_spike=skip", "train.recovery.window=19"], None),
        (
            ["train.mtp_loss_weight=0", "train.mtp_loss_weight_decay=0"],
            "mtp_loss_weight=0: the MTP blocks never run, and their 94.2 k parameters stay",
        ),
        (["train.mtp_loss_weight=0"], None),  # until the decay
        (
            ["train.indexer_loss_weight=0"],
            "indexer_loss_weight=0: indexers choose .* never train, .* stay initial ones",
        ),
        (["train.indexer_loss_weight=0", "train.indexer_phase=full"], None),
    ],
)
def test_what_does_little_is_a_warning(args, told, caplog):
    run = compose_run(["model=v4_tiny", *args])
    lines = list(warnings(run, resolve(run)))
    assert len(lines) == (told is not None)
    if told is not None:
        tell_reach(run, resolve(run))
        (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert record.getMessage() == lines[0]
        assert re.search(told, lines[0])


@pytest.mark.parametrize(
    "args",
    [
        ["optim.schedule.warmup_steps=15", "optim.schedule.decay_start=0.2"],
        ["optim.schedule.warmup_steps=15", "train.stages=[{until_tokens: 81920, lr: 1e-4}]"],
    ],
)
def test_warm_up_warning_names_the_rate_that_the_steps_take(args):
    """Decay may begin within a warm-up, and a stage may have a rate of its own."""
    run = compose_run(["model=v4_tiny", *args])
    plan, tokens, rates = resolve(run), 0, []
    for number in range(1, plan.steps + 1):
        step = plan_step(number, tokens, plan, run.train, run.optim)
        rates.append(step.lr)
        tokens += step.batch_tokens
    assert max(rates) < run.optim.lr
    (line,) = warnings(run, plan)
    assert f"reaches {max(rates):.3g} of optim.lr=0.003 at most" in line


@pytest.mark.core
def test_what_a_longer_run_would_come_to_is_one_line(caplog):
    run = compose_run([
        "model=v4_tiny", "train.eval_every=30", "train.checkpoint_every=3",
        "train.keep_checkpoints_every=10", "train.log_every=21", "train.monitor_every=20",
        "train.stages=[{until_tokens: 11000},{name: later, until_tokens: 90000}]",
    ])  # fmt: skip
    plan = resolve(run)
    assert list(never(run, plan)) == [
        "stage later", "train.eval_every=30", "train.log_every=21",
        "train.keep_checkpoints_every=10 among train.checkpoint_every=3",
        "the decay of the learning rate",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO):
        tell_reach(run, plan)
    (record,) = caplog.records
    assert record.getMessage().startswith("never within the run's 20 steps: stage later, ")


def test_profile_before_a_resume_is_moved_behind_it_once(tmp_path, caplog):
    corpus = write_corpus(tmp_path)

    def start(steps):
        caplog.clear()
        run = small_run(
            tmp_path / "run", corpus, steps=steps, eval_every=0, profile_start=1,
            profile_steps=3 if steps > 1 else 0,
        )  # fmt: skip
        run.sample.tokens = 0
        fit(run)
        return any(
            "profile_start=1 lies before this start" in r.getMessage() for r in caplog.records
        )

    written = tmp_path / "run" / "profile"
    assert not start(1)
    assert not written.exists()
    assert start(3)
    assert sorted(p.name for p in written.iterdir()) == ["steps_2_3.json", "steps_2_3.txt"]
    assert not start(4)
    assert len(list(written.iterdir())) == 2
