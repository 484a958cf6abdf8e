"""What must hold between the sections of a config, each of which is right by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from model.config import Kernels, LayerKind
from optim.config import ScheduleKind, StateDtype
from parallel.config import EngineName
from quant.config import ExpertFormat
from train.config.schema import ActivationCheckpoint, Precision, RunConfig, Weights


def checks_across(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """Whether each thing holds, and the line that says what is wrong where it does not."""
    recovery = run.train.recovery
    yield (
        run.parallel.pp == 1 or not recovery.may_anticipate,
        f"train.recovery.anticipatory={recovery.anticipatory.value} is not built for pipeline"
        f" stages (parallel.pp={run.parallel.pp}): say never",
    )
    yield (
        run.optim.schedule.kind is not ScheduleKind.constant or not run.train.bias_stops_at_decay,
        "train.bias_stops_at_decay=true needs a learning rate that decays, but"
        f" optim.schedule.kind={run.optim.schedule.kind.value}",
    )
    yield from _width_checks(run)
    yield (
        bool(run.init_from)
        or "vocab_size" in run.data.unused()
        or run.data.vocab_size <= run.model.vocab_size,
        f"data.vocab_size={run.data.vocab_size} asks for more entries of the tokenizer that is"
        f" trained here than model.vocab_size={run.model.vocab_size} has rows: give both alike",
    )
    kinds = [run.model.kind(layer) for layer in range(run.model.num_hidden_layers)]
    yield (
        LayerKind.mha not in kinds or not run.sample.tokens,
        f"sample.tokens={run.sample.tokens} asks for text, but a layer is of"
        f" model.layer_kinds={LayerKind.mha.value}, which has no cache: say sample.tokens=0",
    )
    yield bool(run.run_dir.strip()), f"run_dir={run.run_dir!r} must name a folder"
    yield (
        run.train.weights == Weights.model or run.train.eval_only or bool(run.init_from),
        f"train.weights={run.train.weights.value} says what train.eval_only evaluates or init_from"
        f" starts from, but train.eval_only=false and init_from={run.init_from!r}",
    )
    if run.engine.name is EngineName.deepspeed:
        yield from _deepspeed_checks(run)
    if run.parallel.offload == "optimizer+master":
        yield from _offload_checks(run)
    if run.train.compile:
        yield from _compile_checks(run)
    blocks = run.model.num_hidden_layers + run.model.num_nextn_predict_layers
    yield (
        not run.parallel.offload_activations or blocks > 1,
        "parallel.offload_activations=true keeps the last block on the device, and the model has no"
        f" other (model.num_hidden_layers={run.model.num_hidden_layers}): say false",
    )


def _compile_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What is no whole graph, or would make the compiler see another one each time."""
    asked, kernels = "train.compile=true", run.model.kernels
    yield (
        kernels in (Kernels.triton, Kernels.reference),
        f"{asked} makes whole graphs of model.kernels=triton or reference, not of"
        f" {Kernels(kernels).value}: say model.kernels=triton",
    )
    yield (
        run.model.deterministic,
        f"model.deterministic=false does not go with {asked}, whose graphs are judged by gradients"
        " that have the same bits each time: say model.deterministic=true",
    )
    checkpoint = run.train.activation_checkpoint
    yield (
        checkpoint is not ActivationCheckpoint.selective,
        f"train.activation_checkpoint={checkpoint.value} watches every operation, of which"
        f" {asked} makes one: say block, or none",
    )
    why = f"exchanges between ranks inside a block, of which {asked} makes one graph"
    yield from _degrees_of_one(run, ("pp", "ep", "cp"), why, "train.compile=false")
    yield (
        run.engine.name is EngineName.torch,
        f"engine.name={run.engine.name.value} does not go with {asked}: say engine=torch",
    )
    yield (
        not run.parallel.offload_activations,
        f"parallel.offload_activations=true takes what operations keep, of which {asked} makes"
        " one: say train.activation_checkpoint=block",
    )
    yield (
        not run.quant.active,
        f"quant.recipe={run.quant.recipe.value} is not built for {asked}: say"
        " train.compile=false, or quant=none",
    )
    yield (
        not run.train.recovery.may_anticipate,
        f"train.recovery.anticipatory={run.train.recovery.anticipatory.value} is not built for"
        f" {asked}: say never",
    )


def _degrees_of_one(
    run: RunConfig, keys: Sequence[str], why: str, instead: str
) -> Iterator[tuple[bool, str]]:
    """Degrees that something cannot have, those of stages among them."""
    for key in keys:
        degree = getattr(run.parallel, key)
        yield degree == 1, f"parallel.{key}={degree} {why}: say {instead}, or parallel.{key}=1"
    for index, stage in enumerate(run.train.stages):
        named = f"train.stages[{index}].cp={stage.cp}"
        yield stage.cp in (None, 1), f"{named} {why}: say {instead}, or cp: 1"


def _offload_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What reads fp32 weights that are not on the device, or has none to keep elsewhere."""
    asked, instead = "parallel.offload=optimizer+master", "say parallel.offload=optimizer"
    yield (
        run.train.precision is not Precision.fp32,
        f"{asked} keeps masters of weights that compute in bf16, but train.precision=fp32 has none:"
        f" {instead}",
    )
    yield (
        not run.quant.active,
        f"{asked} does not go with quant.recipe={run.quant.recipe.value}, which reads masters on"
        f" the device: {instead}",
    )
    yield (
        not run.train.ema_decay,
        f"{asked} does not go with train.ema_decay={run.train.ema_decay}, which averages the"
        f" weights on the device: {instead}",
    )


def _deepspeed_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What ZeRO's flat shards, or this engine, cannot do exactly."""
    asked = "engine.name=deepspeed"
    why = f"does not go with {asked}, which knows data ranks only"
    yield from _degrees_of_one(run, ("pp", "ep", "cp", "dp_replicate"), why, "engine=torch")
    yield (
        run.parallel.offload == "none",
        f"parallel.offload={run.parallel.offload} is the torch engine's, {asked} was asked for: say"
        " engine=torch, or engine=deepspeed_zero2_offload",
    )
    yield (
        not run.parallel.offload_activations,
        f"parallel.offload_activations=true is the torch engine's, {asked} was asked for: say"
        " engine=torch, or train.activation_checkpoint=block",
    )
    yield (
        run.optim.state_dtype is StateDtype.fp32,
        f"optim.state_dtype={run.optim.state_dtype.value} does not go with {asked}, which keeps"
        " moments as fp32 shards: say engine=torch, or optim.state_dtype=fp32",
    )
    yield (
        not run.train.ema_decay or run.engine.zero_stage < 3,
        f"train.ema_decay={run.train.ema_decay} needs whole weights on every rank, which {asked}"
        f" with engine.zero_stage={run.engine.zero_stage} does not keep: say engine.zero_stage=2",
    )
    yield (
        not run.train.recovery.may_anticipate,
        f"train.recovery.anticipatory={run.train.recovery.anticipatory.value} is not built for"
        f" {asked}: say never",
    )


def _width_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """The grouped matmul of the experts takes rows of whole 16 bytes."""
    model, quantised = run.model, run.quant.parts().experts is not ExpertFormat.none
    if model.kernels is Kernels.reference and not quantised:
        return
    unit = 4 if run.train.precision is Precision.fp32 else 8
    by = (
        "quant.experts"
        if quantised
        else f"model.kernels={model.kernels.value} (reference takes any)"
    )
    for key in ("hidden_size", "moe_intermediate_size"):
        width = getattr(model, key)
        yield (
            width % unit == 0,
            f"model.{key}={width} must be a multiple of {unit} for {by} in"
            f" train.precision={run.train.precision.value}",
        )
