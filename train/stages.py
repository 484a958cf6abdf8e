"""The plan of a run: the stage of a token position and what a step there does (reference C.2).

Progress is counted in trained tokens: positions of rows, padding included, so that it depends on
the config alone and not on the documents. A step begins at some position, belongs to the stage in
which it begins, and moves the position by its global batch. Everything here is a pure function of
the config; nothing remembers where the run stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from conf.problems import refuse
from model.config import IndexerPhase, LayerKind, ModelConfig
from parallel.config import CpScoring, ParallelConfig
from parallel.pipeline_split import check_microbatches
from train.config.schema import RunConfig, StageConfig, TrainConfig
from train.errors import UserError, check_all

# Of the expert bias, steps times speed. With 2.2 and 8.8 a gate of v4_nano was last above twice its
# mean load at step 68 and 35 of 220 (docs/LOG.md, Optimizer); from 6,000 steps on it is the paper's
# speed, and extrapolated.
_BIAS_WAY = 6.0
_LEAST_SPEED, _MOST_SPEED = 1e-3, 0.05


_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Stage:
    """A stage with every value filled in; fields as in :class:`train.config.schema.StageConfig`."""

    name: str
    start_tokens: int
    until_tokens: int
    seq_len: int
    global_batch_tokens: int
    ramp_from_tokens: int
    ramp_tokens: int
    micro_batch_size: int
    cp: int
    indexer_phase: IndexerPhase
    lr: float | None
    mtp_loss_weight: float | None
    bias_update_speed: float
    quantised: bool

    @property
    def quantum_tokens(self) -> int:
        """Tokens by which the batch grows at a time; every batch of the stage is a multiple."""
        return math.gcd(self.ramp_from_tokens, self.global_batch_tokens)

    def batch_tokens(self, tokens: int) -> int:
        """Tokens of the step that begins at position ``tokens``."""
        done = tokens - self.start_tokens
        if not self.ramp_from_tokens or done >= self.ramp_tokens:
            return self.global_batch_tokens
        grown = (self.global_batch_tokens - self.ramp_from_tokens) * done // self.ramp_tokens
        return self.ramp_from_tokens + grown // self.quantum_tokens * self.quantum_tokens

    def constant_until(self, tokens: int) -> int:
        """First position from which a step may differ in size from the one that begins here."""
        batch = self.batch_tokens(tokens)
        if batch == self.global_batch_tokens:
            return self.until_tokens
        grown = batch + self.quantum_tokens - self.ramp_from_tokens
        rise = self.global_batch_tokens - self.ramp_from_tokens
        return min(self.until_tokens, self.start_tokens - (-grown * self.ramp_tokens // rise))


@dataclass(frozen=True)
class LossWeights:
    """Weights of the side losses in one step, and the speed of the expert bias."""

    mtp: float
    indexer: float
    balance: float
    bias_update_speed: float


@dataclass(frozen=True)
class StagePlan:
    """The whole run.

    Attributes:
        stages: in order, without gaps.
        steps: optimizer steps that the run takes.
        end_tokens: position after the last of them.
        total_tokens: horizon of the schedules; beyond ``end_tokens`` where ``train.steps`` ends the
            run early.
    """

    stages: tuple[Stage, ...]
    steps: int
    end_tokens: int
    total_tokens: int

    def stage(self, tokens: int) -> Stage:
        """Stage of the step that begins at position ``tokens``."""
        for stage in self.stages:
            if tokens < stage.until_tokens:
                return stage
        return self.stages[-1]

    def batch_tokens(self, tokens: int) -> int:
        """Tokens of the step that begins at position ``tokens``."""
        return self.stage(tokens).batch_tokens(tokens)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest rows that are reached."""
        return max(stage.seq_len for stage in self.reached())

    def reached(self) -> tuple[Stage, ...]:
        """Stages in which at least one step begins."""
        return tuple(s for s in self.stages if self.step_at(s.start_tokens) < self.steps)

    def step_at(self, tokens: int) -> int:
        """Number of steps that begin before position ``tokens``."""
        return _count(self.stages, tokens, None)[0]

    def tokens_at(self, step: int) -> int:
        """Position at which step number ``step`` (from 0) begins, within the stages."""
        return _count(self.stages, self.stages[-1].until_tokens, step)[1]


def resolve(run: RunConfig) -> StagePlan:
    """Fill in the stages of a run and count its steps.

    Raises:
        UserError: stages that cannot be, or one in which no step begins; names it and the values.
    """
    plan, problems = survey(run)
    refuse(UserError, problems)
    assert plan is not None
    return plan


def survey(run: RunConfig) -> tuple[StagePlan | None, list[str]]:
    """The plan of a run, and all that is wrong with it.

    Returns:
        None for the plan where its steps cannot be counted; the problems, none where it is right.
    """
    train = run.train
    stages = tuple(_stages(train, run.parallel.cp))
    uncountable, problems = list[str](), list[str]()
    for index, stage in enumerate(stages):
        label = f"{_label(train, index)}: " if train.stages else "train."
        uncountable += (label + text for ok, text in _lengths(stage) if not ok)
        problems += (label + text for ok, text in _rows_and_phase(stage, run) if not ok)
    if uncountable:
        return None, [*uncountable, *problems]
    total = stages[-1].until_tokens
    if train.bias_update_speed is None:
        speed = bias_speed(_count(stages, total, None)[0])
        stages = tuple(_stages(replace(train, bias_update_speed=speed), run.parallel.cp))
    steps, end = _count(stages, total, train.steps or None)
    plan = StagePlan(stages, steps, end, total)
    for index, stage in enumerate(plan.reached()):
        before = plan.step_at(stage.start_tokens)
        if plan.step_at(stage.until_tokens) == before:
            problems.append(
                f"{_label(train, index)}: no step begins in it, since until_tokens="
                f"{stage.until_tokens} and the last step before it ends at {plan.tokens_at(before)}"
            )
    problems += [*_scoring_problems(plan, run), *_atomics_problems(plan, run)]
    return plan, problems


def bias_speed(steps: int) -> float:
    """Speed of the expert bias where none is asked for.

    Gates collapse in the first steps of Muon and come back when a bias has gone about as far as
    scores lie apart. The paper's 1e-3 does so within a thousandth of a run of a million steps; a
    run of hundreds needs a speed by which its whole length is worth several such ways.

    Args:
        steps: of the whole plan, the horizon of the schedules.
    """
    return min(_MOST_SPEED, max(_LEAST_SPEED, _BIAS_WAY / steps))


def _scoring_problems(plan: StagePlan, run: RunConfig) -> Iterator[str]:
    """What a balanced scoring order lacks: without it nothing would follow the order."""
    if run.parallel.cp_scoring is CpScoring.own:
        return
    asked = f"parallel.cp_scoring={run.parallel.cp_scoring.value}"
    if not _has_indexer(run.model):
        yield (
            f"{asked} shares out the indexer's work, but model.attention={run.model.attention} has"
            f" no layer of kind {LayerKind.csa.value}"
        )
    reached = plan.reached()
    if not any(s.cp > 1 and s.indexer_phase == IndexerPhase.sparse for s in reached):
        phases = ", ".join(f"cp={s.cp} indexer_phase={s.indexer_phase}" for s in reached)
        yield (
            f"{asked} needs a stage with cp above 1 whose indexer chooses"
            f" (indexer_phase={IndexerPhase.sparse.value}), but there is {phases}"
        )
    for index, stage in enumerate(reached):
        if stage.cp > 1 and stage.seq_len % (2 * stage.cp):
            label = f"{_label(run.train, index)}: " if run.train.stages else "train."
            yield (
                f"{label}seq_len={stage.seq_len} must be a multiple of 2 * cp={2 * stage.cp} under"
                f" {asked}, which halves shards"
            )


def _atomics_problems(plan: StagePlan, run: RunConfig) -> Iterator[str]:
    """What is added in no order are gradients of chosen entries: some stage has to choose."""
    reached = plan.reached()
    chooses = any(s.indexer_phase == IndexerPhase.sparse for s in reached)
    if not (run.model.deterministic or chooses):
        phases = ", ".join(f"indexer_phase={s.indexer_phase}" for s in reached)
        yield (
            "model.deterministic=false acts in a stage whose indexer chooses"
            f" (indexer_phase={IndexerPhase.sparse.value}), but there is {phases}: say"
            " model.deterministic=true"
        )


def check_contexts(plan: StagePlan, run: RunConfig, layout: ParallelConfig) -> None:
    """Refuse stages whose rows these ranks, or this model, cannot hold in shards.

    Args:
        plan: the resolved plan.
        run: the config.
        layout: resolved.

    Raises:
        UserError: names the stage and the values, and how many steps come before it.
    """
    refuse(UserError, _context_problems(plan, run, layout))


def _context_problems(plan: StagePlan, run: RunConfig, layout: ParallelConfig) -> Iterator[str]:
    kinds = [run.model.kind(layer) for layer in range(run.model.num_hidden_layers)]
    whole = next((i for i, k in enumerate(kinds) if k is LayerKind.mha), None)
    for index, stage in enumerate(plan.reached()):
        before = ""
        if steps := plan.step_at(stage.start_tokens):
            before = f"; what comes before it runs with train.steps={steps}"
        needs = (
            f"{_label(run.train, index)} needs cp={stage.cp} (rows of {stage.seq_len} tokens in"
            f" {stage.cp} shards)"
        )
        if layout.shard_degree % stage.cp:
            yield (
                f"{needs}, which must divide the parallel.dp_shard={layout.dp_shard} * parallel.cp="
                f"{layout.cp} ranks that share parameters{before}"
            )
        if stage.cp > 1 and whole is not None:
            yield (
                f"{needs}, but layer {whole} of model.attention={run.model.attention} is"
                f" {kinds[whole].value}: it would need whole rows{before}"
            )


def loss_weights(stage: Stage, train: TrainConfig, decaying: bool) -> LossWeights:
    """Weights of a step of ``stage``.

    Args:
        stage: the stage it belongs to.
        train: the ``train`` section.
        decaying: whether the learning rate has begun to decay.
    """
    mtp = train.mtp_loss_weight_decay if decaying else train.mtp_loss_weight
    full, warmup = (stage.indexer_phase == p for p in (IndexerPhase.full, IndexerPhase.warmup))
    if warmup:  # everything but the indexer stands still
        return LossWeights(0.0, train.indexer_loss_weight, 0.0, 0.0)
    return LossWeights(
        mtp=mtp if stage.mtp_loss_weight is None else stage.mtp_loss_weight,
        indexer=0.0 if full else train.indexer_loss_weight,
        balance=train.balance_loss_weight,
        bias_update_speed=(
            0.0 if decaying and train.bias_stops_at_decay else stage.bias_update_speed
        ),
    )


def trains(name: str, stage: Stage, weights: LossWeights) -> bool:
    """Whether the parameter ``name`` learns in a step of ``stage``; if not, it does not move."""
    if ".attn.indexer." in name:
        return weights.indexer > 0
    if stage.indexer_phase == IndexerPhase.warmup:
        return False
    return weights.mtp > 0 or not name.startswith("mtp.")


def check_rows(plan: StagePlan, data_degree: int) -> None:
    """Check that every batch that is reached splits into whole microbatches on each rank.

    Args:
        plan: the resolved plan.
        data_degree: ranks that hold different tokens; the stage's cp of them share rows.

    Raises:
        UserError: names the stage and both values.
    """
    refuse(UserError, (_row_problem(stage, data_degree // stage.cp) for stage in plan.reached()))


def _row_problem(stage: Stage, row_degree: int) -> str | None:
    rows, unit = stage.quantum_tokens // stage.seq_len, stage.micro_batch_size * row_degree
    if rows % unit == 0:
        return None
    fitting = math.gcd(rows // row_degree, stage.micro_batch_size)
    advice = f"; {fitting} would do" if rows % row_degree == 0 else ""
    what = "batches that grow by" if stage.ramp_from_tokens else "a batch of"
    return (
        f"stage {stage.name}: {what} {rows} rows (train.global_batch_tokens="
        f"{stage.global_batch_tokens}, seq_len={stage.seq_len}) must be a multiple of"
        f" train.micro_batch_size={stage.micro_batch_size} times {row_degree} data rank(s)"
        f"{advice}"
    )


def check_schedule(plan: StagePlan, layout: ParallelConfig) -> None:
    """Check that the pipeline's schedule admits the number of microbatches of every step.

    Args:
        plan: the resolved plan, whose rows split evenly (:func:`check_rows`).
        layout: resolved.

    Raises:
        ValueError: names the keys and both values.
    """
    if layout.pp > 1:
        check_all(*(partial(_check_microbatches, s, layout) for s in plan.reached()))


def _check_microbatches(stage: Stage, layout: ParallelConfig) -> None:
    sizes, tokens = {stage.global_batch_tokens}, stage.start_tokens
    while tokens < stage.until_tokens:
        sizes.add(stage.batch_tokens(tokens))
        tokens = stage.constant_until(tokens)
    for size in sorted(sizes):
        groups = max(1, layout.data_degree // stage.cp)
        batch = (
            f"a batch of {size} tokens in stage {stage.name} (seq_len={stage.seq_len},"
            f" train.micro_batch_size={stage.micro_batch_size}, {groups} data rank(s))"
        )
        count = size // stage.seq_len // (stage.micro_batch_size * groups)
        check_microbatches(layout, count, batch)


def _stages(train: TrainConfig, cp: int) -> Iterator[Stage]:
    listed = train.stages or [
        StageConfig(name="all", until_tokens=max(1, train.steps) * train.global_batch_tokens)
    ]
    start, speed = 0, train.bias_update_speed or 0.0  # null: steps must be counted first
    for index, s in enumerate(listed):
        yield Stage(
            name=s.name or str(index),
            start_tokens=start,
            until_tokens=s.until_tokens,
            seq_len=_given(s.seq_len, train.seq_len),
            global_batch_tokens=_given(s.global_batch_tokens, train.global_batch_tokens),
            ramp_from_tokens=s.ramp_from_tokens,
            ramp_tokens=s.ramp_tokens,
            micro_batch_size=_given(s.micro_batch_size, train.micro_batch_size),
            cp=_given(s.cp, cp),
            indexer_phase=train.indexer_phase if s.indexer_phase is None else s.indexer_phase,
            lr=s.lr,
            mtp_loss_weight=s.mtp_loss_weight,
            bias_update_speed=_given(s.bias_update_speed, speed),
            quantised=s.quantised,
        )
        start = s.until_tokens


def _given(value: _Number | None, default: _Number) -> _Number:
    return default if value is None else value


def _label(train: TrainConfig, index: int) -> str:
    """Config path of a stage, with its name where it has one."""
    if not train.stages:
        return "train"
    name = train.stages[index].name
    return f"train.stages[{index}]" + (f" ({name})" if name else "")


def _lengths(stage: Stage) -> Iterator[tuple[bool, str]]:
    """What makes a stage's steps countable: it has a length, and its batch grows."""
    batch, ramp = stage.global_batch_tokens, stage.ramp_from_tokens
    yield (
        stage.until_tokens > stage.start_tokens,
        f"until_tokens={stage.until_tokens} must lie beyond the end of the stage before it,"
        f" {stage.start_tokens}",
    )
    yield (
        0 <= ramp < batch and ramp % stage.seq_len == 0,
        f"ramp_from_tokens={ramp} must be a multiple of seq_len={stage.seq_len} below"
        f" global_batch_tokens={batch}",
    )
    yield (
        (stage.ramp_tokens > 0) == (ramp > 0),
        f"ramp_tokens={stage.ramp_tokens} and ramp_from_tokens={ramp} belong together",
    )
    length = stage.until_tokens - stage.start_tokens
    yield (
        length <= 0 or stage.ramp_tokens < length,
        f"ramp_tokens={stage.ramp_tokens} must be below the stage's {length} tokens: the batch"
        f" would never reach global_batch_tokens={batch}",
    )


def _rows_and_phase(stage: Stage, run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What rows and the indexer's phase ask of batch and model."""
    batch, seq_len = stage.global_batch_tokens, stage.seq_len
    yield (
        batch % seq_len == 0,
        f"global_batch_tokens={batch} must be a multiple of seq_len={seq_len}",
    )
    yield (
        seq_len % stage.cp == 0,
        f"seq_len={seq_len} must be a multiple of cp={stage.cp}, its shards",
    )
    limit = run.model.max_position_embeddings
    yield seq_len <= limit, f"seq_len={seq_len} exceeds model.max_position_embeddings={limit}"
    weight, topk = run.train.indexer_loss_weight, run.model.index_topk
    if stage.indexer_phase == IndexerPhase.sparse and _has_indexer(run.model):
        yield (
            topk > 1 or weight == 0,
            f"indexer_phase=sparse teaches the indexer the order of the entries that it chose, but"
            f" model.index_topk={topk} is one: train.indexer_loss_weight={weight} must be 0",
        )
    if stage.indexer_phase == IndexerPhase.warmup:
        yield (
            weight > 0,
            f"indexer_phase=warmup trains nothing with train.indexer_loss_weight={weight}",
        )
        yield (
            _has_indexer(run.model),
            f"indexer_phase=warmup needs a csa layer, but model.name={run.model.name} has none"
            f" (model.attention={run.model.attention})",
        )


def _has_indexer(model: ModelConfig) -> bool:
    return any(model.kind(layer) is LayerKind.csa for layer in range(model.num_hidden_layers))


def _count(stages: tuple[Stage, ...], until: int, max_steps: int | None) -> tuple[int, int]:
    """Steps that begin before ``until`` (at most ``max_steps``), and the position after them."""
    steps = tokens = 0
    for stage in stages:
        end = min(until, stage.until_tokens)
        while tokens < end and (max_steps is None or steps < max_steps):
            batch = stage.batch_tokens(tokens)
            here = -(-(min(end, stage.constant_until(tokens)) - tokens) // batch)
            if max_steps is not None:
                here = min(here, max_steps - steps)
            steps, tokens = steps + here, tokens + here * batch
    return steps, tokens
