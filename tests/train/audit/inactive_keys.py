"""Config keys that a run may rightly leave unread, and when.

Every other key that nothing read is a wish that was ignored. Each line here is a claim that can be
wrong, so it gives its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from model.config import IndexerPhase, LayerKind, Residual
from optim.config import OptimizerName, ScheduleKind
from parallel.config import EngineName
from train.config.schema import RunConfig, WandbMode
from train.stages import resolve

When = Callable[[RunConfig], bool]


def _always(_: RunConfig) -> bool:
    return True


def _no_layer(*kinds: LayerKind) -> When:
    def when(run: RunConfig) -> bool:
        layers = range(run.model.num_hidden_layers)
        return not any(run.model.kind(layer) in kinds for layer in layers)

    return when


def _phase(phase: IndexerPhase) -> When:
    """Some stage of the run is in this phase."""

    def when(run: RunConfig) -> bool:
        phases = {stage.indexer_phase for stage in run.train.stages}
        return phase in phases | {run.train.indexer_phase}

    return when


def _by_torch(run: RunConfig) -> bool:
    return run.engine.name is EngineName.torch


def _never_quantised(run: RunConfig) -> bool:
    return not any(stage.quantised for stage in resolve(run).reached())


def _never_yarn(run: RunConfig) -> bool:
    return resolve(run).longest_row < run.model.yarn_from_seq_len


# Pattern of full keys, why they may stay unread, in which runs.
INACTIVE: tuple[tuple[str, str, When], ...] = (
    ("data.workers", "the corpus was prepared by an earlier run", _always),
    ("dry_run", "read by the entry, before anything is built", _always),
    ("engine.*", "DeepSpeed reads them; validation refuses them with torch", _by_torch),
    ("model.num_key_value_heads", "1 is the only value that validation lets through", _always),
    ("model.scoring_func", "the only value that validation lets through", _always),
    ("model.topk_method", "the only value that validation lets through", _always),
    ("model.norm_topk_prob", "the only value that validation lets through", _always),
    ("model.tie_word_embeddings", "the only value that validation lets through", _always),
    ("model.attention_bias", "the only value that validation lets through", _always),
    (
        "model.max_position_embeddings",
        "a bound that the plan of stages is checked against",
        _always,
    ),
    ("model.num_hash_layers", "model.routers names every layer", lambda r: bool(r.model.routers)),
    ("model.hc_*", "one plain stream", lambda r: Residual(r.model.residual) is Residual.plain),
    ("model.index_*", "no layer has an indexer", _no_layer(LayerKind.csa)),
    (
        "model.compress_rope_theta",
        "no layer has entries",
        _no_layer(LayerKind.csa, LayerKind.hca),
    ),
    ("model.compress_ratios", "no layer has entries", _no_layer(LayerKind.csa, LayerKind.hca)),
    ("model.rope_scaling.*", "no layer has entries", _no_layer(LayerKind.csa, LayerKind.hca)),
    ("model.rope_scaling.*", "every row is shorter than model.yarn_from_seq_len", _never_yarn),
    ("model.rope_scaling.*", "YaRN is off", lambda r: r.model.rope_scaling.factor == 1.0),
    ("optim.muon.*", "no Muon in this run", lambda r: r.optim.name is OptimizerName.adamw),
    (
        "optim.schedule.*",
        "a constant schedule has no end",
        lambda r: r.optim.schedule.kind is ScheduleKind.constant,
    ),
    (
        "optim.schedule.decay_start*",
        "the cosine falls from the start",
        lambda r: r.optim.schedule.kind is ScheduleKind.cosine,
    ),
    (
        "optim.schedule.decay_start",
        "given in tokens",
        lambda r: r.optim.schedule.decay_start_tokens > 0,
    ),
    ("quant.*", "nothing is quantised", lambda r: not r.quant.active),
    ("quant.*", "the run ends before the stage that quantises", _never_quantised),
    ("parallel.schedule", "no pipeline", lambda r: r.parallel.pp == 1),
    ("train.profile_start", "no profile", lambda r: r.train.profile_steps == 0),
    ("train.indexer_loss_weight", "the dense phase has none", _phase(IndexerPhase.full)),
    ("train.balance_loss_weight", "warm-up trains the indexer", _phase(IndexerPhase.warmup)),
    ("train.bias_update_speed", "warm-up trains the indexer", _phase(IndexerPhase.warmup)),
    ("train.mtp_loss_weight*", "which one acts: where the learning rate stands", _always),
    ("train.bias_stops_at_decay", "asked when the learning rate decays", _always),
    ("sample.*", "no text is asked for", lambda r: r.sample.tokens == 0),
    ("wandb.*", "Weights & Biases is off", lambda r: r.wandb.mode is WandbMode.disabled),
)


def needed(run: RunConfig, key: str) -> bool:
    """Whether something has to read ``key`` in this run."""
    if key.startswith("data.") and key.removeprefix("data.") in run.data.unused():
        return False
    return not any(fnmatchcase(key, pattern) and when(run) for pattern, _, when in INACTIVE)
