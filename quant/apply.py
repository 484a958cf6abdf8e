"""Swaps quantisation into a model's seams, from a table, and takes it out again.

One line of :data:`SEAMS` says which modules a part of the config means and what replaces which
seam. Nothing else in the code base knows where quantisation happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from model.config import ModelConfig
from model.linear import ActivationCast, BlockLinear, GroupedLinear, Linear
from quant.config import ExpertFormat, Parts, QuantConfig, QuantEngine
from quant.fake_quant import WeightQuantiser
from quant.formats import FP8_KV, FP8_WEIGHT, MXFP4, BlockFormat
from quant.indexer import IndexerCast
from quant.kv import KVCast
from quant.linear import QuantOp
from quant.probe import QuantProbe
from quant.stored import read_as_master, read_as_stored
from quant.transformer_engine import TransformerEngineOp, transformer_engine_op


@dataclass(frozen=True)
class QuantRecord:
    """One swapped seam.

    Attributes:
        name: FQN of the module.
        part: part of the config that asked for it.
        seam: ``op`` (a matmul), ``cast`` (an activation) or ``weight`` (a stored dtype).
        format: of the weight, or of the activation for a cast.
        activations: the op also casts its input to FP8.
        gradients: the op also casts the operands of its backward pass to FP8.
        engine: what multiplies.
        undo: puts back what was there.
    """

    name: str
    part: str
    seam: str
    format: str
    activations: bool = False
    gradients: bool = False
    engine: str = QuantEngine.emulated.value
    undo: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def parameter(self) -> str | None:
        """FQN of the parameter that is quantised; None for an activation."""
        return None if self.seam == "cast" else f"{self.name}.weight"


@dataclass(frozen=True)
class Site:
    """A module to swap, with all that a swap may need."""

    name: str
    part: str
    module: nn.Module
    parent: nn.Module
    parts: Parts
    config: QuantConfig
    probe: QuantProbe
    keep_weights: bool
    rope_dim: int


def _expert_format(parts: Parts) -> BlockFormat | None:
    return {ExpertFormat.fp4: MXFP4, ExpertFormat.fp8: FP8_WEIGHT}.get(parts.experts)


def _swap_op(site: Site, fmt: BlockFormat) -> QuantRecord:
    module, parts = site.module, site.parts
    assert isinstance(module, Linear | GroupedLinear)
    old = module.op
    # The released code multiplies wo_a in bf16, though its weight is FP8 (reference B.3).
    activations = parts.activations and (parts.gradients or not isinstance(module, BlockLinear))
    engine = QuantEngine(site.config.engine)
    whole = isinstance(module, BlockLinear) and (
        engine is QuantEngine.transformer_engine
        or module.out_features // module.groups % fmt.rows != 0
    )
    op = QuantOp(
        name=site.name,
        part=site.part,
        weight=WeightQuantiser(fmt, site.keep_weights),
        activations=activations,
        gradients=parts.gradients,
        probe=site.probe,
        grouped=module.op if isinstance(module, GroupedLinear) else None,
        owner=module if whole and isinstance(module, BlockLinear) else None,
    )
    module.op = transformer_engine_op(op) if engine is QuantEngine.transformer_engine else op
    return QuantRecord(
        site.name, site.part, "op", fmt.name, activations, parts.gradients, engine.value,
        lambda: setattr(module, "op", old),
    )  # fmt: skip


def _swap_cast(site: Site, cast: ActivationCast, fmt: str) -> QuantRecord:
    parent, child, old = site.parent, site.name.rpartition(".")[2], site.module
    setattr(parent, child, cast)
    return QuantRecord(site.name, site.part, "cast", fmt, undo=lambda: setattr(parent, child, old))


def _swap_kv(site: Site) -> QuantRecord:
    cast = KVCast(site.rope_dim, site.name, site.probe)
    return _swap_cast(site, cast, f"{FP8_KV.name}, rope dims bf16")


def _swap_indexer(site: Site) -> QuantRecord:
    return _swap_cast(site, IndexerCast(site.name, site.probe), f"hadamard, {MXFP4.name}")


def _swap_stored(site: Site) -> QuantRecord:
    read_as_stored(site.module, site.name, site.probe)
    return QuantRecord(
        site.name, site.part, "weight", "bf16", undo=lambda: read_as_master(site.module)
    )


@dataclass(frozen=True)
class Seam:
    """One line of the table.

    Attributes:
        part: the config's key.
        modules: regular expression over a module's whole name.
        kind: class of the modules.
        wanted: whether the config asks for it.
        swap: does it.
    """

    part: str
    modules: str
    kind: type[nn.Module]
    wanted: Callable[[Parts], bool]
    swap: Callable[[Site], QuantRecord]


_BLOCK = r"(layers|mtp)\.\d+\."
SEAMS: tuple[Seam, ...] = (
    Seam("experts", _BLOCK + r"ffn\.experts\.w[123]", GroupedLinear,
         lambda p: p.experts is not ExpertFormat.none,
         lambda s: _swap_op(s, _expert_format(s.parts) or FP8_WEIGHT)),
    Seam("shared_experts", _BLOCK + r"ffn\.shared_experts\.w[123]", Linear,
         lambda p: p.shared_experts, lambda s: _swap_op(s, FP8_WEIGHT)),
    Seam("attention", _BLOCK + r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|wq|wk|wv|wo|indexer\.wq_b)", Linear,
         lambda p: p.attention, lambda s: _swap_op(s, FP8_WEIGHT)),
    Seam("mtp", r"mtp\.\d+\.(e_proj|h_proj)", Linear,
         lambda p: p.mtp, lambda s: _swap_op(s, FP8_WEIGHT)),
    Seam("kv", _BLOCK + r"attn\.(kv_cast|compressor\.cast)", ActivationCast,
         lambda p: p.kv, _swap_kv),
    Seam("indexer", _BLOCK + r"attn\.indexer\.(q_cast|compressor\.cast)", ActivationCast,
         lambda p: p.indexer, _swap_indexer),
    Seam("stored", r"(embed|head|norm)|mtp\.\d+\.(enorm|hnorm|norm)"
         r"|" + _BLOCK + r"((attn|ffn)_norm|attn\.(q|kv)_norm|ffn\.gate"
         r"|attn\.(indexer\.)?compressor\.(wkv|wgate|norm)|attn\.indexer\.weights_proj)",
         nn.Module, lambda p: p.stored, _swap_stored),
)  # fmt: skip


def apply_quant(
    model: nn.Module,
    config: QuantConfig,
    probe: QuantProbe,
    keep_weights: bool = False,
) -> list[QuantRecord]:
    """Swap in what the config asks for.

    Args:
        model: modules bear their global names; ``model.config`` is its ModelConfig. May be one
            pipeline stage, and may be sharded already.
        config: the ``quant`` section.
        probe: will be told what runs.
        keep_weights: quantise a weight once per change instead of at every use. Right where
            parameters are updated in place on the very tensor that the op reads (one process),
            wrong where a layout gathers them anew (FSDP).

    Returns:
        One record per swapped seam; :func:`remove_quant` undoes them.

    Raises:
        ValueError: a name of the table stands for another kind of module; or something is already
            quantised; or Transformer Engine is asked for and cannot be used.
    """
    config.validate()
    assert isinstance(model.config, ModelConfig)
    parts, rope_dim = config.parts(), model.config.qk_rope_head_dim
    modules = dict(model.named_modules())
    records: list[QuantRecord] = []
    for seam in SEAMS:
        if not seam.wanted(parts):
            continue
        for name, module in modules.items():
            if not re.fullmatch(seam.modules, name):
                continue
            _check_seam(seam, name, module)
            parent = modules[name.rpartition(".")[0]]
            site = Site(
                name, seam.part, module, parent, parts, config, probe, keep_weights, rope_dim
            )
            records.append(seam.swap(site))
    return records


def reads_master(config: QuantConfig, parameter: str) -> bool:
    """Whether an op rounds the fp32 master of ``parameter`` itself, once the config is applied.

    Layouts must hand such a parameter over in fp32, whatever the compute dtype is.
    """
    parts, module = config.parts(), parameter.removesuffix(".weight")
    return any(
        seam.wanted(parts) and re.fullmatch(seam.modules, module)
        for seam in SEAMS
        if issubclass(seam.kind, Linear | GroupedLinear)
    )


def remove_quant(records: Iterable[QuantRecord]) -> None:
    """Put every seam back as it was before :func:`apply_quant`."""
    for record in records:
        record.undo()


def absent_parts(config: QuantConfig, records: Iterable[QuantRecord]) -> list[str]:
    """Parts that the config asks for and no record belongs to (a model without an indexer, say).

    Under pipeline parallelism a part may be absent on one stage only: join the records first.
    """
    parts, found = config.parts(), {record.part for record in records}
    asked = dict.fromkeys(seam.part for seam in SEAMS if seam.wanted(parts))
    return [part for part in asked if part not in found]


def describe(record: QuantRecord) -> str:
    """What params.csv says of the record's parameter."""
    extra = ", FP8 activations" * record.activations + ", FP8 gradients" * record.gradients
    return record.format + extra


def _check_seam(seam: Seam, name: str, module: nn.Module) -> None:
    if not isinstance(module, seam.kind):
        raise ValueError(
            f"quant.{seam.part}: {name} is a {type(module).__name__}, the table wants a"
            f" {seam.kind.__name__}"
        )
    op = getattr(module, "op", None)
    if isinstance(module, KVCast | IndexerCast) or isinstance(op, QuantOp | TransformerEngineOp):
        raise ValueError(f"quant.{seam.part}: {name} is quantised already; remove_quant first")
