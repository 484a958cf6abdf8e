"""No option without an effect: a changed value of any key shows somewhere, or is refused by name.

One row a key: the new value, where it must show, and what else has to stand for the key to matter.
A key without a row fails, and so does a row whose effect does not show.
"""

import json
import logging
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from data.config import LongDocuments, OnBadLine, SourceConfig, SourceKind, Task, TextUnit
from data.sources import open_documents
from model.config import Attention, IndexerPhase, Kernels, LayerKind, Residual, Router
from optim.config import (
    MatmulDtype,
    NewtonSchulzIterations,
    OptimizerName,
    ScheduleKind,
    StateDtype,
    UpdateScale,
)
from parallel.config import CpScoring, EngineName, OffloadTo
from parallel.deepspeed_engine import DeepSpeedEngine
from quant.config import ExpertFormat, QuantEngine, Recipe
from tests.train.audit.key_effects import (
    called,
    data,
    device,
    foretold,
    handed,
    launches,
    memory,
    or_refused,
    outcome,
    params,
    plan,
    recovery,
    step,
    two_steps,
    zero_json,
)  # fmt: skip
from tests.train.test_degenerate_runs import SMALL
from train import build
from train.checkpoint.own_folder import save_own
from train.config.command_line import compose_run
from train.config.load import dump, validate
from train.config.recovery import Anticipatory, Remedy
from train.config.schema import (
    ActivationCheckpoint,
    Device,
    Precision,
    RunConfig,
    StageConfig,
    WandbMode,
    Weights,
)  # fmt: skip
from train.display.build import build_profiler
from train.errors import USER_ERRORS
from train.pretrain import _train, main
from train.stages import resolve


def row(value: Any, shows: Any, /, **also: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A changed value, its effect (or a pattern of its refusal), and what stands beside it."""
    return value, shows, {key.replace("__", "."): v for key, v in also.items()}


checkpoints = handed("train.build.Checkpoints", build.build_checkpoints)
profiler = handed(
    "train.display.build.ProfilerWindow",
    lambda run: build_profiler(run, resolve(run), _Engine(), 0),  # pyright: ignore
)
wandb = handed("wandb.init", _train)
waits = handed("parallel.lost_rank.lost_rank_ends_the_job", _train)
started = handed("train.build.build", lambda run: full(run, Path()))
hub = handed("datasets.load_dataset", lambda run: open_documents("t", run.data.sources["t"], "x"))
embedded = handed("data.sources.embedded_documents", lambda run: data(run, Path()))
workers = handed(
    "data.tokenise.progress_map",
    lambda run: data(
        replace(run, data=replace(run.data, cache_dir=f"{run.data.cache_dir}/none")), Path()
    ),
)
ONLY = "is not part of DeepSeek-V4"
ONE_RANK = "world size is 1"
ON_HUB = {"data.sources.t.kind": SourceKind.hub, "data.sources.t.path": "nowhere/at_all"}
SYNTHETIC = {
    "data.sources.t.kind": SourceKind.synthetic, "data.sources.t.path": "",
    "data.sources.t.documents": 30, "data.sources.t.document_characters": 600,
}  # fmt: skip
DECAY = {"optim.schedule.decay_start": 0.5}
STAGES = {"train.stages": [StageConfig(until_tokens=256), StageConfig(until_tokens=512)]}
QAT = {"quant.recipe": Recipe.fp4_qat}
OFFLINE = {"wandb.mode": WandbMode.offline}
HELD_OUT = {"data__validation__bytes": 600, "data__validation__max_fraction": 0.5}
HELD = {"data.validation.bytes": 600, "train.eval_every": 1}
SAVES = {"train.checkpoint_every": 1}
BACK = {
    "train.recovery.on_spike": Remedy.rollback, "train.recovery.window": 4,
    "train.checkpoint_every": 1, "train.keep_checkpoints": 2,
}  # fmt: skip
ZERO = {"engine.name": EngineName.deepspeed}
NS = [NewtonSchulzIterations(10)]


ROWS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "run_dir": row("elsewhere", outcome),
    "seed": row(1, data),
    "init_seed_offset": row(1, step),
    "engine.name": row(
        EngineName.deepspeed, handed("train.build.init_process_group", build.join_ranks)
    ),
    "engine.zero_stage": row(3, zero_json, **ZERO),
    "engine.offload_optimizer": row(OffloadTo.cpu, zero_json, **ZERO),
    "engine.offload_parameters": row(OffloadTo.cpu, zero_json, engine__zero_stage=3, **ZERO),
    "engine.nvme_path": row(
        "elsewhere", zero_json, engine__zero_stage=3, engine__nvme_path="drive",
        engine__offload_optimizer=OffloadTo.nvme, **ZERO,
    ),
    "engine.own_checkpoints": row(
        True,
        handed(
            "parallel.deepspeed_engine.DeepSpeedEngine.save_own",
            lambda run: save_own(run, object.__new__(DeepSpeedEngine), 1, []),
        ),
        **ZERO,
    ),
    "engine.config": row("absent.json", or_refused(zero_json), **ZERO),
    "init_from": row("nowhere", "init_from=nowhere"),
    "tensorboard": row(True, outcome),
    "dry_run": row(True, started),
    # ---- model
    "model.name": row("mine", memory),
    "model.scale": row(5, "model.scale=5 is a place in the family"),
    "model.vocab_size": row(300, params),
    "model.hidden_size": row(64, params),
    "model.num_hidden_layers": row(2, "compress_ratios has 4 entries"),
    "model.num_attention_heads": row(4, params),
    "model.num_key_value_heads": row(2, ONLY),
    "model.head_dim": row(32, params),
    "model.qk_rope_head_dim": row(4, step),
    "model.q_lora_rank": row(8, params),
    "model.o_groups": row(1, params),
    "model.o_lora_rank": row(8, params),
    "model.compress_ratios": row([0, 8, 8, 0], params),
    "model.layer_kinds": row([LayerKind.swa, LayerKind.hca, LayerKind.hca], params),
    "model.sliding_window": row(4, step),
    "model.index_n_heads": row(8, params),
    "model.index_head_dim": row(32, params),
    "model.index_topk": row(2, step),
    "model.n_routed_experts": row(8, params),
    "model.n_shared_experts": row(0, params),
    "model.num_experts_per_tok": row(1, step),
    "model.moe_intermediate_size": row(32, params),
    "model.scoring_func": row("sigmoid", ONLY),
    "model.topk_method": row("greedy", ONLY),
    "model.norm_topk_prob": row(False, ONLY),
    "model.routed_scaling_factor": row(1.0, step),
    "model.num_hash_layers": row(0, step),
    "model.routers": row([Router.learned] * 3, step),
    "model.swiglu_limit": row(0.1, step, model__initializer_range=1.0),
    "model.hc_mult": row(2, params),
    "model.hc_sinkhorn_iters": row(1, step),
    "model.hc_eps": row(1e-2, step),
    "model.hc_gamma": row(True, params),
    "model.hc_identity_base": row(1.0, step),
    "model.hc_fn_gain": row(1.0, step),
    "model.rms_norm_eps": row(1e-3, step),
    "model.rope_theta": row(100.0, step),
    "model.compress_rope_theta": row(100.0, step),
    "model.rope_scaling.factor": row(4.0, step),
    "model.rope_scaling.original_max_position_embeddings": row(64, step),
    "model.rope_scaling.beta_fast": row(4000.0, step),
    "model.rope_scaling.beta_slow": row(2000.0, step),
    "model.yarn_from_seq_len": row(33, step),
    "model.max_position_embeddings": row(16, "exceeds model.max_position_embeddings=16"),
    "model.tie_word_embeddings": row(True, ONLY),
    "model.attention_bias": row(True, ONLY),
    "model.num_nextn_predict_layers": row(2, params, model__compress_ratios=[0, 4, 8]),
    "model.initializer_range": row(0.05, step),
    "model.attention": row(Attention.hca, params),
    "model.residual": row(Residual.plain, params),
    "model.kernels": row(Kernels.reference, step),
    "model.deterministic": row(False, launches, model__kernels=Kernels.triton),
    "model.loss_chunk_tokens": row(1, called("model.loss.project")),
    # ---- data
    "data.tokenizer": row("bpe", data, data__vocab_size=512, model__vocab_size=513),
    "data.vocab_size": row(
        513, data, data__tokenizer="bpe", data__vocab_size=512, model__vocab_size=513,
        data__sources__t__path="varied.jsonl"),
    "data.cache_dir": row(
        "cache/other", handed("data.prepare.cache_root", lambda r: data(r, Path()))),
    "data.sources": row({}, embedded),
    "data.sources.kind": row(SourceKind.text, data),
    "data.sources.path": row("other.jsonl", data),
    "data.sources.text_key": row("title", data),
    "data.sources.unit": row(TextUnit.line, data, data__sources__t__kind=SourceKind.text),
    "data.sources.on_bad_line": row(
        OnBadLine.skip, or_refused(data), data__sources__t__path="bad.jsonl"),
    "data.sources.subset": row("x", hub, **ON_HUB),
    "data.sources.split": row("x", hub, **ON_HUB),
    "data.sources.revision": row("x", hub, **ON_HUB),
    "data.sources.streaming": row(True, data),
    "data.sources.stated_tokens": row(10**6, foretold, data__sources__t__streaming=True),
    "data.sources.packages": row(
        ["argparse"], embedded, data__sources={"t": SourceConfig(packages=["json"])}),
    "data.sources.documents": row(20, data, **SYNTHETIC),
    "data.sources.document_characters": row(512, data, **SYNTHETIC),
    "data.sources.tasks": row([Task.tables], data, **SYNTHETIC),
    "data.sources.seed": row(1, data, **SYNTHETIC),
    "data.sources.weight": row(0.5, "weights sum to 0.5"),
    "data.workers": row(2, workers),
    "data.fim.rate": row(1.0, data),
    "data.sources.min_tokens": row(40, data),
    "data.sources.long_tokens": row(
        30, data, data__sources__t__long_times=3, data__sources__t__long_tokens=50),
    "data.sources.long_times": row(
        2, data, data__sources__t__long_times=3, data__sources__t__long_tokens=50),
    "data.packing.pool_documents": row(2, data, data__packing__pool_rows=0),
    "data.packing.pool_rows": row(1, data, data__packing__pool_documents=1),
    "data.packing.long_documents": row(LongDocuments.truncate, data),
    "data.validation.bytes": row(900, data),
    "data.validation.max_fraction": row(0.05, data, data__validation__bytes=2000),
    "data.validation.seed": row(1, data, **HELD_OUT),
    "data.validation.ngram": row(
        8, data, data__validation__max_overlap=0.5, **HELD_OUT),
    "data.validation.max_overlap": row(
        0.0, data, data__validation__ngram=2, **HELD_OUT),
    # ---- optim
    "optim.name": row(OptimizerName.adamw, params),
    "optim.lr": row(1e-3, plan),
    "optim.schedule.kind": row(ScheduleKind.constant, plan, **DECAY),
    "optim.schedule.warmup_steps": row(1000, plan),
    "optim.schedule.end_lr_ratio": row(0.5, plan, optim__schedule__kind=ScheduleKind.cosine),
    "optim.schedule.decay_start": row(0.1, plan),
    "optim.schedule.decay_start_tokens": row(10, plan),
    "optim.muon.momentum": row(0.5, step),
    "optim.muon.nesterov": row(False, two_steps),
    "optim.muon.newton_schulz": row([NewtonSchulzIterations(12)], step),
    "optim.muon.newton_schulz.steps": row(12, step, optim__muon__newton_schulz=NS),
    "optim.muon.newton_schulz.a": row(1.9, step, optim__muon__newton_schulz=NS),
    "optim.muon.newton_schulz.b": row(-1.51, step, optim__muon__newton_schulz=NS),
    "optim.muon.newton_schulz.c": row(0.4, step, optim__muon__newton_schulz=NS),
    "optim.muon.rms": row(0.3, step),
    "optim.muon.scale": row(UpdateScale.original, step),
    "optim.muon.weight_decay": row(0.5, params),
    "optim.muon.dtype": row(MatmulDtype.bf16, step, optim__muon__dtype=MatmulDtype.fp32),
    "optim.muon.splits": row({"<block>.attn.wq_b.weight": "num_attention_heads"}, params),
    "optim.adamw.betas": row([0.5, 0.9], step),
    "optim.adamw.eps": row(1e-4, step),
    "optim.adamw.weight_decay": row(0.5, params),
    "optim.state_dtype": row(StateDtype.bf16, step),
    "optim.grad_clip": row(0.01, step, optim__adamw__eps=1e-4),
    # ---- quant
    "quant.recipe": row(Recipe.deployed, step),
    "quant.engine": row(QuantEngine.transformer_engine, "quant.engine=transformer_engine"),
    "quant.experts": row(ExpertFormat.fp4, step),
    "quant.shared_experts": row(True, step),
    "quant.attention": row(True, step),
    "quant.mtp": row(True, step),
    "quant.activations": row(True, step, quant__experts=ExpertFormat.fp8),
    "quant.gradients": row(True, step, quant__experts=ExpertFormat.fp8, quant__activations=True),
    "quant.kv": row(True, step),
    "quant.indexer": row(True, step),
    "quant.stored": row(True, step),
    # ---- parallel
    "parallel.dp_replicate": row(2, ONE_RANK, parallel__dp_shard=1),
    "parallel.dp_shard": row(2, ONE_RANK),
    "parallel.ep": row(2, "parallel.ep=2 must divide the 1 data ranks"),
    "parallel.pp": row(2, ONE_RANK, parallel__dp_shard=1),
    "parallel.cp": row(2, plan),
    "parallel.cp_scoring": row(
        CpScoring.balanced, "parallel.cp_scoring=balanced needs a stage with cp above 1"
    ),
    "parallel.schedule": row("gpipe", "parallel.schedule=gpipe needs parallel.pp above 1"),
    "parallel.offload": row(
        "optimizer",
        handed(
            "train.build.Transfers", lambda run: build.build_offload(run, None, None)
        ),
    ),
    "parallel.offload_activations": row(
        True, handed("train.build.prepare_blocks", lambda run: step(run, Path()))
    ),
    "parallel.timeout_seconds": row(5.0, waits),
    # ---- train
    "train.steps": row(3, plan),
    "train.seq_len": row(64, plan),
    "train.global_batch_tokens": row(64, plan),
    "train.micro_batch_size": row(1, plan),
    "train.precision": row(Precision.bf16, params),
    "train.head_precision": row(Precision.bf16, params, train__precision=Precision.bf16),
    "train.device": row(Device.cuda, device),
    "train.stages": row([StageConfig(until_tokens=384)], plan),
    "train.stages.name": row("first", plan, **STAGES),
    "train.stages.until_tokens": row(128, plan, **STAGES),
    "train.stages.seq_len": row(64, plan, **STAGES),
    "train.stages.global_batch_tokens": row(64, plan, **STAGES),
    "train.stages.ramp_from_tokens": row(64, plan, train__stages=[
        StageConfig(until_tokens=512, ramp_tokens=128, ramp_from_tokens=32)]),
    "train.stages.ramp_tokens": row(256, plan, train__steps=0, train__stages=[
        StageConfig(until_tokens=1024, ramp_tokens=128, ramp_from_tokens=32)]),
    "train.stages.micro_batch_size": row(1, plan, **STAGES),
    "train.stages.cp": row(2, plan, **STAGES),
    "train.stages.indexer_phase": row(IndexerPhase.full, plan, **STAGES),
    "train.stages.lr": row(1e-4, plan, **STAGES),
    "train.stages.mtp_loss_weight": row(0.2, plan, **STAGES),
    "train.stages.bias_update_speed": row(0.2, plan, **STAGES),
    "train.stages.quantised": row(False, step, **STAGES, **QAT),
    "train.indexer_phase": row(IndexerPhase.full, plan),
    "train.mtp_loss_weight": row(0.2, plan),
    "train.mtp_loss_weight_decay": row(0.2, plan, **DECAY),
    "train.indexer_loss_weight": row(0.2, plan),
    "train.balance_loss_weight": row(0.2, plan),
    "train.bias_update_speed": row(0.2, plan),
    "train.bias_stops_at_decay": row(True, plan, **DECAY),
    "train.probe_every": row(1, outcome, train__seq_len=128, train__global_batch_tokens=128,
                             train__micro_batch_size=1),
    "train.eval_every": row(1, outcome, **HELD_OUT),
    "train.eval_only": row(True, "train.eval_only=true has nothing to evaluate"),
    "train.eval_tokens": row(64, outcome, **HELD),
    "train.final_eval_tokens": row(64, outcome, **HELD_OUT),
    "train.checkpoint_every": row(1, outcome),
    "train.async_checkpoint": row(True, checkpoints),
    "train.keep_checkpoints": row(1, outcome, **SAVES),
    "train.keep_checkpoints_every": row(1, checkpoints, **SAVES),
    "train.keep_best_checkpoints": row(1, checkpoints, **SAVES, **HELD),
    "train.time_limit_seconds": row(1e-6, outcome),
    "train.log_every": row(3, outcome, train__steps=3),
    "train.log_samples": row(True, outcome),
    "train.monitor_every": row(1, plan),
    "train.activation_checkpoint": row(
        ActivationCheckpoint.block, called("model.block.Block.forward")),
    "train.compile": row(
        True, handed("torch.compile", lambda run: step(run, Path())),
        model__kernels=Kernels.reference),
    "train.ema_decay": row(0.5, step),
    "train.weights": row(Weights.average, "train.weights=average"),
    "train.profile_start": row(1, profiler, train__profile_steps=1),
    "train.profile_steps": row(1, profiler),
    "train.recovery.on_nonfinite": row(Remedy.stop, recovery),
    "train.recovery.on_spike": row(Remedy.skip, recovery, train__recovery__window=4),
    "train.recovery.window": row(5, recovery, **BACK),
    "train.recovery.threshold": row(2.0, recovery, **BACK),
    "train.recovery.patience": row(2, recovery, **BACK),
    "train.recovery.max_skips": row(2, recovery),
    "train.recovery.max_rollbacks": row(1, recovery, **BACK),
    "train.recovery.skip_steps": row(2, recovery, **BACK),
    "train.recovery.anticipatory": row(Anticipatory.always, recovery),
    "train.recovery.anticipatory_lag": row(
        2, outcome, train__steps=3, train__recovery__anticipatory=Anticipatory.always),
    "train.recovery.anticipatory_steps": row(2, recovery, **BACK),
    "sample.prompt": row("b", outcome, sample__temperature=0.0),
    "sample.tokens": row(4, outcome),
    "sample.temperature": row(0.0, outcome, sample__tokens=8),
    "wandb.mode": row(WandbMode.offline, wandb),
    "wandb.project": row("mine", wandb, **OFFLINE),
    "wandb.entity": row("us", wandb, **OFFLINE),
    "wandb.name": row("name", wandb, **OFFLINE),
}  # fmt: skip


class _Engine:
    rank = 0
    device = None


def keys(schema: Any, path: str = "") -> Iterator[str]:
    """Every key of a schema; of a list or dict of sections the key itself and theirs."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        inner = [kind for kind in {hints[f.name], *get_args(hints[f.name])} if is_dataclass(kind)]
        if inner != [hints[f.name]]:
            yield f"{path}{f.name}"
        for kind in inner:
            yield from keys(kind, f"{path}{f.name}.")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("acts")
    lines = [
        json.dumps({"text": f"{i} " + " ".join(f"w{i * j % 23}" for j in range(3 + i % 17)),
                    "title": f"title {i}"})
        for i in range(80)
    ]  # fmt: skip
    (folder / "t.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "other.jsonl").write_text("\n".join(lines[:40]) + "\n")
    words = [{"text": " ".join(f"{i * j * 7919:x}" for j in range(40))} for i in range(30)]
    (folder / "varied.jsonl").write_text("\n".join(map(json.dumps, words)) + "\n")
    (folder / "bad.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(texts) -> RunConfig:
    return compose_run([*SMALL, "data.sources.t.kind=jsonl", "data.sources.t.path=t.jsonl"])


def changed(run: RunConfig, key: str, value: Any) -> RunConfig:
    """A copy with one key changed; in lists the first section, in dicts the one named t."""
    run = deepcopy(run)
    section: Any = run
    *path, leaf = key.split(".")
    for name in path:
        section = section[name] if isinstance(section, dict) else getattr(section, name)
        if isinstance(section, list):
            section = section[0]
        elif isinstance(section, dict) and "t" in section and name == "sources" and path[-1] != "t":
            section = section["t"]
    setattr(section, leaf, deepcopy(value))
    return run


def effect_of(effect: Any, run: RunConfig, folder: Path) -> Any:
    """The effect, or the line of its refusal."""
    try:
        validate(run)
        return effect(run, folder)
    except USER_ERRORS as error:
        return f"error: {error}"


def test_every_key_has_a_row():
    assert sorted(ROWS) == sorted(keys(RunConfig))


@pytest.mark.parametrize("key", sorted(ROWS))
def test_changed_value_shows_or_is_refused(key, base, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    value, shows, also = ROWS[key]
    run = base
    for name, given in also.items():
        run = changed(run, name, given)
    run = changed(changed(run, "run_dir", "run"), "data.cache_dir", str(texts / "cache"))
    new = changed(run, key, value)
    for source in (*run.data.sources.values(), *new.data.sources.values()):
        if source.path.endswith(".jsonl"):
            source.path = str(texts / source.path)
    if isinstance(shows, str):
        told = effect_of(full, new, tmp_path)
        assert re.search(re.escape(shows), str(told))
        assert key.rpartition(".")[2] in told
        return
    before = effect_of(shows, run, tmp_path)
    after = effect_of(shows, new, tmp_path)
    assert not str(before).startswith("error: "), before
    assert not str(after).startswith("error: "), after
    assert before != after


def full(run: RunConfig, folder: Path) -> Any:
    """Everything that a start asks, and the start."""
    return main(OmegaConf.create(dump(run)))
