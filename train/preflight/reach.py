"""Whether a run comes to what it asks for: schedules, profile, evaluations within its steps.

What cannot happen is refused. What does less than its name says, or belongs to a longer run whose
beginning this is, is told in a line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

from conf.problems import refuse
from data.epochs import SourceUse
from model.config import IndexerPhase
from model.parameter_counts import parameter_counts
from optim.config import ScheduleKind
from optim.schedule import check_run_length, decay_start
from parallel.launch import launched_rank
from train.config.recovery import Anticipatory, Remedy
from train.config.scaled import scaled_line
from train.config.schema import RunConfig
from train.errors import UserError, check_all
from train.preflight.forecast import quantity
from train.probes.tasks import LEAST_TOKENS
from train.stages import StagePlan, loss_weights

log = logging.getLogger(__name__)

_LONG_WARMUP = 1 / 3  # of the run's steps
MOST_EPOCHS = 4.0  # a token read more often teaches measurably less than a new one
_EVERY = (
    "probe_every", "eval_every", "checkpoint_every", "keep_checkpoints_every", "monitor_every",
    "log_every",
)  # fmt: skip


def check_reach(run: RunConfig, plan: StagePlan) -> None:
    """Refuse what cannot happen within the plan.

    Raises:
        UserError: names the key, its value and the length of the run.
    """
    check_all(
        lambda: check_run_length(run.optim.schedule, plan.total_tokens),
        lambda: refuse(UserError, _impossible(run, plan)),
    )


def tell_reach(run: RunConfig, plan: StagePlan) -> None:
    """Tell what a run asks for that does little, or nothing within its steps; on rank 0 alone."""
    if launched_rank():
        return
    if run.model.scale:
        log.info("%s", scaled_line(run.model.scale))
    for line in warnings(run, plan):
        log.warning("%s", line)
    if absent := list(never(run, plan)):
        log.info("never within the run's %d steps: %s", plan.steps, ", ".join(absent))


def _impossible(run: RunConfig, plan: StagePlan) -> Iterator[str]:
    train, recovery = run.train, run.train.recovery
    shortest = min(stage.seq_len for stage in plan.reached())
    if train.probe_every and shortest < LEAST_TOKENS:
        yield (
            f"train.probe_every={train.probe_every} needs rows of {LEAST_TOKENS} tokens or more, in"
            f" which a needle fits, but train.seq_len={shortest}"
        )
    last = train.profile_start + train.profile_steps - 1
    if train.profile_steps and last > plan.steps:
        yield (
            f"train.profile_start={train.profile_start} and train.profile_steps="
            f"{train.profile_steps} end behind the run's {plan.steps} steps"
        )
    if recovery.anticipatory is Anticipatory.always and recovery.anticipatory_lag >= plan.steps:
        yield (
            f"train.recovery.anticipatory_lag={recovery.anticipatory_lag} leaves no step of the"
            f" run's {plan.steps} to be routed by earlier weights"
        )


def warnings(run: RunConfig, plan: StagePlan) -> Iterator[str]:
    """What is there and does little, in one line each."""
    schedule, recovery = run.optim.schedule, run.train.recovery
    if schedule.warmup_steps > _LONG_WARMUP * plan.steps:
        reached = max(_learning_rates(run, plan))
        told = f"reaches {reached:.3g} of optim.lr={run.optim.lr:g} at most"
        if f"{reached:.3g}" == f"{run.optim.lr:.3g}":
            told = f"reaches optim.lr={run.optim.lr:g} at step {schedule.warmup_steps} only"
        yield (
            f"optim.schedule.warmup_steps={schedule.warmup_steps} takes more than a third of the"
            f" run's {plan.steps} steps: the learning rate {told}"
        )
    longest = max(
        min(plan.steps, plan.step_at(s.until_tokens)) - plan.step_at(s.start_tokens)
        for s in plan.reached()
    )
    if recovery.on_spike is not Remedy.none and longest <= recovery.window:
        yield (
            f"train.recovery.on_spike={recovery.on_spike.value} never acts: a loss is compared with"
            f" train.recovery.window={recovery.window} before it, and no stage has more than"
            f" {longest} steps"
        )
    yield from _untrained(run, plan)


def _untrained(run: RunConfig, plan: StagePlan) -> Iterator[str]:
    """Parts of the model whose loss has the weight 0 in every step: they stay as they are."""
    model, stages = run.model, plan.reached()
    if all(stage.indexer_phase == IndexerPhase.warmup for stage in stages):
        return
    weights = [loss_weights(stage, run.train, decaying)
               for stage in stages for decaying in (False, True)]  # fmt: skip
    if model.num_nextn_predict_layers and not any(w.mtp for w in weights):
        count = parameter_counts(model).by_kind["mtp"]
        yield (
            f"train.mtp_loss_weight={run.train.mtp_loss_weight:g}: the MTP blocks never run, and"
            f" their {quantity(count)} parameters stay as they are, in an export too;"
            " model.num_nextn_predict_layers=0, without their entries in model.compress_ratios,"
            " leaves them out"
        )
    chooses = any(stage.indexer_phase == IndexerPhase.sparse for stage in stages)
    if model.num_indexers and chooses and not any(w.indexer for w in weights):
        source = f"those of init_from={run.init_from}" if run.init_from else "initial ones"
        yield (
            f"train.indexer_loss_weight={run.train.indexer_loss_weight:g}: indexers choose entries"
            f" but never train, their weights stay {source}"
        )


def _learning_rates(run: RunConfig, plan: StagePlan) -> Iterator[float]:
    """Of every step, as it will be logged: decay and the stages' own rates are in it."""
    from train.step import plan_step  # noqa: PLC0415  torch: a start that is refused needs none

    tokens = 0
    for number in range(1, plan.steps + 1):
        yield plan_step(number, tokens, plan, run.train, run.optim).lr
        tokens += plan.batch_tokens(tokens)


def data_warnings(uses: Sequence[SourceUse]) -> Iterator[str]:
    """Sources that a run passes over too often.

    Args:
        uses: what it reads of each.
    """
    for use in uses:
        epochs, tokens = use.foretold_epochs, use.tokens or use.stated
        if epochs is not None and epochs > MOST_EPOCHS:
            yield (
                f"{epochs:,.1f} epochs: the run reads the {quantity(tokens)} training"
                f" tokens of {use.name} more than {MOST_EPOCHS:g} times and will learn them by"
                " heart; give more text (data.sources), or fewer train.steps"
            )


def never(run: RunConfig, plan: StagePlan) -> Iterator[str]:
    """What a longer run would come to."""
    train, schedule = run.train, run.optim.schedule
    reached = plan.reached()
    yield from (f"stage {stage.name}" for stage in plan.stages if stage not in reached)
    for key in _EVERY:
        if getattr(train, key) > plan.steps:
            yield f"train.{key}={getattr(train, key)}"
    kept, saved = train.keep_checkpoints_every, train.checkpoint_every
    if kept and saved and math.lcm(kept, saved) > plan.steps >= kept:
        yield f"train.keep_checkpoints_every={kept} among train.checkpoint_every={saved}"
    decays = schedule.kind is not ScheduleKind.constant
    if decays and decay_start(schedule, plan.total_tokens) >= plan.end_tokens:
        yield "the decay of the learning rate"
