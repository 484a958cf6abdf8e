"""What a run needs of a rank's memory, under any layout: computed from the config alone.

Parameters, gradients and optimizer states are exact for a given layout; activations are the closed
form of ``model/activation_memory.py``.

Layouts are sharded as ``parallel`` does it: every parameter over dp_shard * cp of its pipeline
stage, experts over ep first; masters and gradients fp32; a layer is gathered whole in its compute
dtype when it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from model.activation_memory import (
    block_activation_bytes,
    gathered_entry_bytes,
    head_bytes,
    mtp_bytes,
)
from model.config import LayerKind, ModelConfig
from model.parameter_counts import parameter_shapes
from model.precision import precision_of
from optim.config import StateDtype
from optim.groups import Owner, build_table
from optim.muon import CHUNK_ELEMENTS
from parallel.config import EngineName, OffloadTo, ParallelConfig
from parallel.pipeline_split import (
    PipelineStageParts,
    in_flight,
    rank_of_stage,
    split_stages,
    stages_per_rank,
)
from train.audit.samples import SAMPLE_SIZES, sample_bytes
from train.config.schema import Precision, RunConfig
from train.preflight.resting import Resting, Values, rest_of_torch, rest_of_zero
from train.preflight.world import RUNTIME
from train.stages import Stage, StagePlan

# Bytes an element that Newton-Schulz holds beside its chunk: fp32 direction, two buffers and three
# small squares in the compute dtype.
_NEWTON_SCHULZ_BYTES = 14
_TRAVELLING_BYTES = 8  # beside it: two chunks of momentum that come from the host; as many masters
_ZERO_BUCKET_BYTES = 4 * 50_000_000  # parallel/zero_config.py


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, by kind.

    Attributes:
        weights: fp32 masters.
        gradients: fp32.
        optimizer: momentum and moments, and the averaged weights where they are kept.
        gathered: weights in their compute dtype, whole, while they are used.
        activations: kept from the forward for the backward pass.
        temporary: the largest that is alive beside the rest: logits of a chunk, whole gradients of
            a layer, or the workspace of Newton-Schulz where it exceeds activations.
        audit: samples of the weights before each of the first steps, and comparing them; on a CPU
            a second set of gradients, where blocks are graphs.
        runtime: interpreter, libraries, CUDA context.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    temporary: int
    audit: int
    runtime: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(vars(self).values())


@dataclass
class _Block:
    """Numbers of one position of the network: a block, the embedding, or norm and head.

    Attributes:
        elements: parameters; ``[0]`` all but routed experts, ``[1]`` routed experts.
        states: optimizer values that go with them.
        gathered: bytes of both in their compute dtype, where it is not fp32.
        fp32: bytes of those that compute in fp32.
    """

    elements: list[float]
    states: list[float]
    gathered: list[float]
    fp32: list[float]


class Needs:
    """Memory of a run under any layout; the parameters are walked through once.

    Args:
        run: the config.
        plan: its stages; those that are reached count.
    """

    def __init__(self, run: RunConfig, plan: StagePlan) -> None:
        self.run, self.stages = run, plan.reached()
        model = run.model
        self.blocks = {
            position: _Block([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
            for position in range(-1, _num_blocks(model) + 1)
        }
        self.largest_matrix = 0.0
        self.values = {"muon": 0.0, "adamw": 0.0, "bf16": 0.0}
        self._splits: dict[tuple[int, str], list[PipelineStageParts]] = {}
        counts = {
            key: getattr(model, key) for key in ("o_groups", "index_n_heads", "num_attention_heads")
        }
        self._table = build_table(parameter_shapes(model), run.optim, counts)
        for record in self._table:
            block = self.blocks[_position(record.name, model)]
            which, size = int(".experts." in record.name), float(math.prod(record.shape))
            muon = record.owner is Owner.muon
            compute = precision_of(record.name, run.train.precision.value).compute.itemsize
            block.elements[which] += size
            block.states[which] += size * (1 if muon else 2)
            (block.gathered if compute < 4 else block.fp32)[which] += size * compute
            self.values["muon" if muon else "adamw"] += size
            if compute < 4 and record.name != "embed.weight":  # read by row, not through a cast
                self.values["bf16"] += size
            if muon:
                self.largest_matrix = max(self.largest_matrix, size / record.num_matrices)

    def peak(self, layout: ParallelConfig, device: str) -> Memory:
        """The fullest rank over pipeline stages and the plan's stages.

        Args:
            layout: resolved degrees.
            device: cpu or cuda.
        """
        assert layout.is_resolved, layout
        memories = [
            self._rank(stage, layout, device, pipeline_stage)
            for pipeline_stage in range(layout.pp)
            for stage in self.stages
        ]
        return max(memories, key=lambda memory: memory.total)

    def resting(self, layout: ParallelConfig) -> Resting:
        """What a rank keeps off its device, the fullest of all pipeline stages."""
        assert layout.is_resolved, layout
        return max(
            (self._resting(layout, part) for part in range(layout.pp)), key=lambda rest: rest.host
        )

    def audited_gradients(self, layout: ParallelConfig, part: int = 0) -> int:
        """Bytes of gradients that audited steps keep on the host, to compare those of graphs with.

        Args:
            layout: resolved degrees.
            part: of the pipeline; graphs go with one.
        """
        return round(4 * self._elements(layout, part)) if self.run.train.compile else 0

    def _resting(self, layout: ParallelConfig, part: int) -> Resting:
        engine = self.run.engine
        if engine.name is EngineName.deepspeed:
            optimizer, parameters = engine.offload_optimizer.value, engine.offload_parameters.value
            return rest_of_zero(optimizer, parameters, Values(**self.values), layout.world_size)
        states, here = self._states(layout, part), self._elements(layout, part)
        share = here / sum(self.values[key] for key in ("muon", "adamw"))
        values = Values(**{key: share * value for key, value in self.values.items()})
        rest = rest_of_torch(self.run.parallel.offload, values, states)
        kept = [(self._away(s, layout, part), _microbatches(layout, s)) for s in self.stages]
        away, travels = max(a for a, _ in kept), round(max(a * count for a, count in kept))
        return replace(
            rest, host=rest.host + round(away), down=rest.down + travels, up=rest.up + travels
        )

    def _elements(self, layout: ParallelConfig, part: int) -> float:
        here, copies = self._held(layout, part)
        return sum(_local(self.blocks[i].elements, layout) for i in [*here, *copies])

    def _states(self, layout: ParallelConfig, part: int) -> float:
        """Bytes of momentum and moments."""
        state_bytes = 2 if self.run.optim.state_dtype == StateDtype.bf16 else 4
        here, _ = self._held(layout, part)
        return state_bytes * sum(_local(self.blocks[i].states, layout) for i in here)

    def _rank(self, stage: Stage, layout: ParallelConfig, device: str, part: int) -> Memory:
        run, model = self.run, self.run.model
        here, copies = self._held(layout, part)
        weights = 4 * self._elements(layout, part)
        states = self._states(layout, part)
        if run.train.ema_decay:
            states += weights
        activations = self._activations(stage, layout, part, here)
        activations -= self._away(stage, layout, part) if device == "cuda" else 0.0
        newton_schulz = _NEWTON_SCHULZ_BYTES * max(self.largest_matrix, CHUNK_ELEMENTS[device])
        temporary = max(
            self._largest_gradient(layout, [*here, *copies]),
            self._logits(stage) if _num_blocks(model) in here else 0.0,
            newton_schulz - activations if self.largest_matrix else 0.0,
        )
        memory = Memory(
            weights=round(weights),
            gradients=round(weights),
            optimizer=round(states),
            gathered=round(self._gathered(layout, [*here, *copies])),
            activations=round(activations),
            temporary=round(temporary),
            audit=self._audit(weights, device, here)
            + (self.audited_gradients(layout, part) if device == "cpu" else 0),
            runtime=round(RUNTIME[device]),
        )
        if run.engine.name is EngineName.deepspeed:
            return self._under_zero(memory, layout, device)
        return self._offloaded(memory, layout, part) if device == "cuda" else memory

    def _offloaded(self, memory: Memory, layout: ParallelConfig, part: int) -> Memory:
        """The same with ``parallel.offload``; on a CPU the host's memory is the device's."""
        offload = self.run.parallel.offload
        if offload == "none":
            return memory
        travels = _TRAVELLING_BYTES * max(self.largest_matrix, CHUNK_ELEMENTS["cuda"])
        averages = memory.optimizer - round(self._states(layout, part))
        memory = replace(memory, optimizer=averages, temporary=memory.temporary + round(travels))
        if offload == "optimizer":
            return memory
        bf16 = round(2 * self.values["bf16"])  # instead of fp32 weights and their bf16 copies
        return replace(
            memory,
            weights=memory.weights - bf16,
            gathered=memory.gathered - bf16,
            temporary=memory.temporary + round(travels),
        )

    def _under_zero(self, memory: Memory, layout: ParallelConfig, device: str) -> Memory:
        """The same under DeepSpeed: whole weights below ZeRO 3, and masters beside the weights."""
        engine, ranks = self.run.engine, layout.world_size
        whole = 4 * sum(self.values[key] for key in ("muon", "adamw"))
        states, gradients = whole + memory.optimizer * ranks, whole
        off_device = device == "cuda" and engine.offload_optimizer is not OffloadTo.none
        if engine.zero_stage > 1:
            gradients = (0.0 if off_device else whole / ranks) + _ZERO_BUCKET_BYTES
        weights, gathered = whole, self._gathered(ParallelConfig(), list(self.blocks))
        if engine.zero_stage == 3:
            on_host = device == "cuda" and engine.offload_parameters is not OffloadTo.none
            weights = 0.0 if on_host else whole / ranks
            gathered = 4 * sum(sorted(sum(b.elements) for b in self.blocks.values())[-2:])
        round_bytes = (_NEWTON_SCHULZ_BYTES + 8) * ranks * CHUNK_ELEMENTS[device]
        memory = replace(
            memory,
            weights=round(weights),
            gradients=round(gradients),
            optimizer=0 if off_device else round(states / ranks),
            gathered=round(gathered),
            temporary=max(memory.temporary, round(round_bytes)),
            audit=memory.audit + round(whole / ranks),  # a copy of the weights is looked at
        )
        # every rank begins with the whole model
        return replace(memory, temporary=memory.temporary + max(0, round(whole) - memory.total))

    def _held(self, layout: ParallelConfig, rank: int) -> tuple[list[int], list[int]]:
        """Positions on a rank of the pp axis, and those of which it holds a second copy."""
        model, here = self.run.model, []
        if layout.pp == 1:
            return list(self.blocks), []
        key = (layout.pp, layout.schedule)
        if key not in self._splits:
            seq_len = max(stage.seq_len for stage in self.stages)
            self._splits[key] = split_stages(model, layout, seq_len)
        copies: list[int] = []
        for parts in self._splits[key]:
            if rank_of_stage(parts.index, layout.pp, layout.schedule) != rank:
                continue
            here += [-1] * parts.first + list(parts.layers)
            if parts.last:
                here += range(model.num_hidden_layers, _num_blocks(model) + 1)
                copies += [-1] * bool(model.num_nextn_predict_layers)  # MTP reads the embedding
        return here, copies

    def _activations(
        self, stage: Stage, layout: ParallelConfig, part: int, here: list[int]
    ) -> float:
        """Bytes kept by the positions ``here``, of the running block, and between stages.

        What follows the main blocks goes back at once, except under gpipe.
        """
        model, compute = self.run.model, self._compute_bytes
        at_the_end = _in_flight(layout, stage, part) if layout.schedule == "gpipe" else 1
        by_block, running = self._kept_by_blocks(stage, layout, part, here)
        kept = sum(by_block)
        for i in here:
            if i >= model.num_hidden_layers:
                kept += head_bytes(model, compute) * at_the_end
                kept += mtp_bytes(model, compute) * at_the_end if i < _num_blocks(model) else 0.0
        if layout.pp > 1:  # an output that is being sent, a gradient that was received
            streams = model.num_streams * model.hidden_size * compute
            kept += 2 * stages_per_rank(layout.schedule) * streams
        return (kept + running) * _tokens(stage)

    def _away(self, stage: Stage, layout: ParallelConfig, part: int) -> float:
        """Bytes that blocks keep on the host in a microbatch: all but what two of them keep."""
        if not self.run.parallel.offload_activations:
            return 0.0
        by_block, _ = self._kept_by_blocks(stage, layout, part, self._held(layout, part)[0])
        return _tokens(stage) * sum(sorted(by_block)[:-2])

    @property
    def _compute_bytes(self) -> int:
        return 4 if self.run.train.precision == Precision.fp32 else 2

    def _kept_by_blocks(
        self, stage: Stage, layout: ParallelConfig, part: int, here: list[int]
    ) -> tuple[list[float], float]:
        """Bytes a token that each block here keeps, and the most that the running one needs."""
        model, mode = self.run.model, self.run.train.activation_checkpoint.value
        compute, held = self._compute_bytes, _in_flight(layout, stage, part)
        at_the_end = held if layout.schedule == "gpipe" else 1
        by_block, running = [], 0.0
        for i in here:
            if 0 <= i < _num_blocks(model):
                main = i < model.num_hidden_layers
                kind, ratio = (model.kind(i), model.ratio(i)) if main else (LayerKind.swa, 0)
                block = block_activation_bytes(model, kind, ratio, compute, mode)
                entries = 0.0  # of all shards, and in the backward pass their fp32 gradients
                if stage.cp > 1:
                    entries = stage.cp * gathered_entry_bytes(model, kind, ratio, compute)
                held_entries = 0.0 if mode == "block" else entries
                by_block.append((block.kept + held_entries) * (held if main else at_the_end))
                gradients = 2 * entries * 4 / compute
                running = max(running, block.running + entries - held_entries + gradients)
        return by_block, running

    def _gathered(self, layout: ParallelConfig, here: list[int]) -> float:
        """Whole weights in their compute dtype: of two blocks when sharded (one is prefetched).

        A pipeline stage stays gathered for the whole step. Blocks that are graphs
        (``train.compile``) are gathered in fp32.
        """
        sharded = layout.shard_degree > 1 or layout.pp > 1
        sizes = []
        for i in here:
            block = self.blocks[i]
            parts = [block.gathered[w] + (block.fp32[w] if sharded else 0.0) for w in range(2)]
            if sharded and self.run.train.compile:
                parts = [4 * elements for elements in block.elements]
            sizes.append(parts[0] + parts[1] / layout.ep)
        if layout.pp > 1 or not sharded:
            return sum(sizes)  # where nothing is sharded every weight has a copy
        return sum(sorted(sizes)[-2:])

    def _largest_gradient(self, layout: ParallelConfig, here: list[int]) -> float:
        """fp32 gradients of the largest block before they are scattered; alone they stay.

        Those of a pipeline stage add up whole over its microbatches.
        """
        sizes = [rest + experts / layout.ep for rest, experts in
                 (self.blocks[i].elements for i in here)]  # fmt: skip
        if layout.pp > 1:
            return 4 * sum(sizes)
        return 4 * max(sizes) if layout.shard_degree > 1 else 0.0

    def _audit(self, weights: float, device: str, here: list[int]) -> int:
        positions = set(here)
        records = [r for r in self._table if _position(r.name, self.run.model) in positions]
        return sample_bytes(records, SAMPLE_SIZES[device], weights)

    def _logits(self, stage: Stage) -> float:
        """Logits of a chunk, their softmax and its gradient, fp32."""
        model = self.run.model
        tokens = min(model.loss_chunk_tokens, stage.micro_batch_size * stage.seq_len)
        return 3 * 4.0 * tokens * model.vocab_size


def _tokens(stage: Stage) -> float:
    """Of a microbatch on a rank."""
    return stage.micro_batch_size * stage.seq_len / stage.cp


def _local(values: list[float], layout: ParallelConfig) -> float:
    """A rank's share of all but routed experts, and of those."""
    shards = layout.shard_degree
    rest, experts = values
    return rest / shards + experts / max(layout.ep, shards)


def _position(name: str, model: ModelConfig) -> int:
    """Position of a parameter in the order of the network; embedding before, head after all."""
    part = name.split(".")
    if part[0] == "layers":
        return int(part[1])
    if part[0] == "mtp":
        return model.num_hidden_layers + int(part[1])
    return -1 if part[0] == "embed" else _num_blocks(model)


def _num_blocks(model: ModelConfig) -> int:
    return model.num_hidden_layers + model.num_nextn_predict_layers


def _in_flight(layout: ParallelConfig, stage: Stage, rank: int) -> float:
    """Microbatches whose activations a rank of the pp axis holds at once, per stage of it."""
    return 1 if layout.pp == 1 else in_flight(layout, rank, _microbatches(layout, stage))


def _microbatches(layout: ParallelConfig, stage: Stage) -> int:
    """Of the largest batch, on each data rank."""
    rows = stage.global_batch_tokens // stage.seq_len
    groups = max(1, layout.data_degree // stage.cp)
    return max(1, rows // (stage.micro_batch_size * groups))
