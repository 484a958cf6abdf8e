"""``engine=deepspeed``: ZeRO 1 to 3 move the bytes, the arithmetic of a step stays ours.

DeepSpeed runs forward, backward and the reduction of gradients, and keeps masters and moments in
pieces, maybe on the host. Everything that decides a result is this repository's. Losses are shares
(DeepSpeed divides by the number of ranks, so they are multiplied by it before the backward pass),
the norm is over all gradients in float64, Muon sees whole matrices (`parallel.zero_optimizer`),
AdamW is ours on DeepSpeed's flat shards. Weights stay fp32 and are cast where they are used, as in
one process.

What the pinned release does is not taken on trust: every step compares one reduced gradient with
the sum of the ranks' own, and the audit compares live weights with masters.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data.batch import Batch
from model.block import Block
from model.kernels.select import select
from model.loss import ModelOutput, Objective
from model.transformer import DeepSeekV4
from optim.build import Optimizer
from optim.config import OptimConfig
from optim.groups import Owner, ParamRecord
from parallel.collectives import whole
from parallel.config import EngineConfig, OffloadTo
from parallel.deepspeed_load import build_extensions, load_deepspeed
from parallel.distributed import RankedEngine, with_last
from parallel.engine import Shares, Update
from parallel.errors import ConfigError
from parallel.mesh import Mesh
from parallel.prefetch import prefetched
from parallel.zero_config import deepspeed_config
from parallel.zero_drive import SwapFolder, checked_io
from parallel.zero_optimizer import MOMENTS, FlatAdamW, ZeroMuon, same_step
from parallel.zero_partitions import Partitions

_STEP = "step_"  # begin of a checkpoint's name, as ours have it
_OFF = 1e-4  # of a reduced gradient from the sum of its parts; a wrong factor is 0.5 or more


class DeepSpeedError(RuntimeError):
    """DeepSpeed did something else than this engine counts on."""


class DeepSpeedEngine(RankedEngine):
    """ZeRO over all ranks as data ranks.

    Args:
        model: whole on every rank, initialised, on ``device``.
        table: owner and decay of every parameter.
        optim: the ``optim`` section.
        config: the ``engine`` section.
        device: where this process computes.
        mesh: this process's place; one data axis.
        rows: of a microbatch.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        table: list[ParamRecord],
        optim: OptimConfig,
        config: EngineConfig,
        device: torch.device,
        mesh: Mesh,
        rows: int,
    ) -> None:
        deepspeed = load_deepspeed(device)
        build_extensions(device, bool(config.nvme_path))
        asked = deepspeed_config(config, rows, optim.grad_clip, device.type == "cuda")
        self.config = config
        self._named = dict(model.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in self._named.items()}
        client = FlatAdamW(self._named, table, optim.adamw)
        self._stage = config.zero_stage
        if self._stage == 3:
            _gather_together(deepspeed, model)
        self._swap = SwapFolder(config.nvme_path) if config.nvme_path else None
        with _swapping(self._swap, config, asked):
            self._zero_engine = _initialised(deepspeed, _Pass(model), client, asked)
        self._runs: Callable[..., Any] = self._zero_engine
        parts = Partitions(self._zero_engine.optimizer, self._stage, self._named, client)
        if config.offload_optimizer is OffloadTo.nvme and not parts.on_drive():
            raise ConfigError(
                "engine.offload_optimizer=nvme, but DeepSpeed keeps groups of masters of less than"
                f" {parts.least_bytes():,} bytes a rank in host memory, and all of this model are:"
                " say engine.offload_optimizer=cpu"
            )
        home = device if config.offload_optimizer is OffloadTo.none else torch.device("cpu")
        group = mesh.data.get_group()
        muon = [record for record in table if record.owner is Owner.muon]
        product = select("symmetric_product", model.config.kernels)
        self._muon = ZeroMuon(muon, optim.muon, parts, group, device, home, product)
        self._adamw = _ZeroAdamW(
            [record.name for record in table if record.owner is Owner.adamw], self._zero_engine,
            parts, self._sharded,
        )  # fmt: skip
        engines = {Owner.muon: _WithState(self._muon, self), Owner.adamw: self._adamw}
        super().__init__(
            model, Optimizer(self._named, table, engines), device, optim.grad_clip, mesh
        )
        self.partitions = parts
        self._watched = "norm.weight"
        self._seen: Tensor | None = None
        self._named[self._watched].register_hook(self._see)
        if self._stage == 3:  # so that whoever samples text finds whole weights
            for method in ("logits", "mtp_logits"):
                setattr(model, method, partial(self._zero_engine, method))

    # ---- passes ------------------------------------------------------------------------------
    def forward_backward(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Accumulate gradients; with the last microbatch DeepSpeed reduces them."""
        self._copy_weights()
        self.partitions.close()
        self._seen = None
        shares = Shares()
        for batch, last in with_last(prefetched(batches, self.device)):
            self._zero_engine.set_gradient_accumulation_boundary(last)
            output = self._forward(batch, objective)
            # DeepSpeed divides by the ranks what is a sum of shares.
            self._zero_engine.backward(output.total * self.data_degree, scale_wrt_gas=False)
            shares.add(output)
        return self._add_up(shares)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], objective: Objective) -> Shares:
        """Run microbatches without gradients; every rank must have as many."""
        return self._add_up(super().evaluate(batches, objective))

    def _forward(self, batch: Batch, objective: Objective) -> ModelOutput:
        if batch.routing is not None:
            objective = replace(objective, replay=dict(batch.routing))
        answer = _Answer()
        total = self._runs("share", *self._inputs(batch).values(), objective, answer)
        assert answer.output is not None
        return replace(answer.output, total=total)

    def embedding_gradient(self, batch: Batch, objective: Objective) -> Tensor | None:
        """Gradient [B, T, D] of a batch's objective by the embeddings it reads first."""
        if self._stage < 3:  # whole weights: past DeepSpeed, which would reduce what is not there
            self._runs = self._zero_engine.module
        self.partitions.close()
        try:
            return super().embedding_gradient(batch, objective)
        finally:
            self._runs = self._zero_engine

    def _copy_weights(self) -> None:
        if self._stage < 3:
            super()._copy_weights()

    # ---- update ------------------------------------------------------------------------------
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole reduced gradients, in turn. Collective."""
        for name in self.partitions.in_order(self.optimizer.trainable_parameters()):
            yield name, self.partitions.gradient(name)

    @torch.no_grad()
    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Replace the reduced gradients, after a backward pass. Collective; for trials."""
        for name, gradient in gradients.items():
            self.partitions.set_gradient(name, gradient)
        mine = gradients[self._watched].double() * self.data_degree
        self._seen = torch.zeros_like(mine) if self.rank else mine

    @torch.no_grad()
    def optimizer_step(self, lr: float, finite: bool) -> Update:
        """Clip and update; with a norm or loss that is not finite, only drop the gradients."""
        norm = self._norm()
        applied = finite and math.isfinite(norm)
        if applied:
            clipped = 0 < self._grad_clip < norm
            self.partitions.client.scale = self._grad_clip / norm if clipped else 1.0
            self.optimizer.step(lr)
        else:
            self._adamw.skip()
        self.optimizer.zero_grad()
        return Update(norm, applied)

    def _norm(self) -> float:
        squares = []
        for name, gradient in self.gradients():
            squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())
            if name == self._watched:
                self._check_reduction(gradient)
        return math.sqrt(math.fsum(torch.stack(squares).tolist()))  # in whatever order they came

    def _see(self, gradient: Tensor) -> None:
        """Add up what this rank's microbatches give to the watched gradient."""
        mine = gradient.detach().double()
        self._seen = mine if self._seen is None else self._seen + mine

    def _check_reduction(self, reduced: Tensor) -> None:
        """DeepSpeed's gradient is the ranks' sum, divided once by their number.

        Raises:
            DeepSpeedError: it is another multiple, or stale.
        """
        seen = self._seen if self._seen is not None else torch.zeros_like(reduced).double()
        expected = self._sum(seen) / self.data_degree
        size, off = expected.norm(), (reduced.double() - expected).norm()
        if torch.isfinite(size) and not off <= _OFF * size:
            factor = float((reduced.double() * expected).sum() / size.square())
            raise DeepSpeedError(
                f"DeepSpeed's gradient of {self._watched} is {factor:.4g} times the ranks' mean"
                f" ({float(off / size):.2g} off): that is not what engine=deepspeed undoes"
            )

    def set_trainable(self, trains: Callable[[str], bool]) -> None:
        """Everything trains: DeepSpeed fixes at its start which gradients it reduces.

        Raises:
            ConfigError: the phase freezes something.
        """
        frozen = [name for name in self._named if not trains(name)]
        if frozen:
            raise ConfigError(
                f"engine.name=deepspeed trains all parameters in every phase, but this one freezes"
                f" {len(frozen)} ({frozen[0]} ...): say engine=torch"
            )

    # ---- values ------------------------------------------------------------------------------
    def weights(self) -> Mapping[str, Tensor]:
        """Copies of what forward passes read, cut over the ranks. Collective."""
        return {name: self._sharded(self.partitions.live(name)) for name in self._named}

    def stale(self) -> list[str]:
        """Parameters whose next forward pass would not read their master. Collective."""
        return [
            name
            for name in self.partitions.in_order(self._named)
            if not torch.equal(self.partitions.live(name), self.partitions.master(name))
        ]

    def state(self) -> dict[str, Tensor]:
        """Copies, each cut over the ranks; :meth:`take_up` brings them back. Collective."""
        buffers = {name for name, _ in self.model.named_buffers()}
        tensors = {
            f"model.{name}": tensor
            for name, tensor in self.model.state_dict().items()
            if name in buffers
        }
        for name in self.partitions.in_order(self._named):
            tensors[f"model.{name}"] = self._sharded(self.partitions.master(name))
        for name, states in self.optimizer.state_dict().items():
            tensors |= {f"optim.{name}.{key}": t for key, t in states.items()}
        return tensors

    @torch.no_grad()
    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Let masters, moments and momentum be those of a filled :meth:`state`. Collective."""
        adamw = self._adamw.names
        steps = {name: state[f"optim.{name}.step"] for name in adamw}
        self.partitions.client.steps = same_step(steps)
        for name in self.partitions.in_order(self._named):
            self.partitions.set_master(name, whole(state[f"model.{name}"]).to(self.device))
        for name in self.partitions.in_order(adamw):
            for key in MOMENTS:
                value = whole(state[f"optim.{name}.{key}"]).to(self.device)
                self.partitions.set_moment(name, key, value)
        self._muon.set_momenta(lambda name: whole(state[f"optim.{name}.momentum"]))
        self.partitions.renew_live()

    def save_own(self, folder: Path, step: int, kept: Collection[int]) -> None:
        """Write DeepSpeed's own checkpoint; those of steps that are not kept go. Collective.

        It holds masters, AdamW's moments and live weights; Muon's momentum is not DeepSpeed's.
        """
        self.partitions.close()
        self._zero_engine.save_checkpoint(str(folder), tag=f"{_STEP}{step:08d}")
        if self.rank == 0:
            names = {f"{_STEP}{number:08d}" for number in {*kept, step}}
            for old in folder.glob(f"{_STEP}*"):
                if old.name not in names:
                    shutil.rmtree(old)

    def _sharded(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that is whole here; a copy."""
        if tensor.ndim == 0:
            return tensor.clone()
        spread = distribute_tensor(tensor.detach(), self._mesh.data, [Shard(0)], src_data_rank=None)
        own = spread.to_local().clone()
        return DTensor(own, spread._spec, requires_grad=False)


class _Answer:
    """Takes the model's record past DeepSpeed's hooks, which copy lists and dicts."""

    output: ModelOutput | None = None


class _Pass(nn.Module):
    """The model as DeepSpeed sees it: a module whose every answer is a tensor.

    ZeRO 3 hangs its hooks for the backward pass on tensors that a module returns; the model's own
    answer is a record, so it is handed over beside its total.
    """

    def __init__(self, model: DeepSeekV4) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the model past its hooks; ``share`` is its forward pass."""
        if method != "share":
            return getattr(DeepSeekV4, method)(self.model, *args, **kwargs)
        *inputs, answer = args
        answer.output = self.model.forward(*inputs)
        return answer.output.total


class _ZeroAdamW:
    """AdamW's part of a step, which is DeepSpeed's own step."""

    algorithm = "adamw"

    def __init__(
        self,
        names: list[str],
        zero_engine: Any,
        partitions: Partitions,
        sharded: Callable[[Tensor], Tensor],
    ) -> None:
        self.names = names
        self._zero_engine, self._partitions, self._sharded = zero_engine, partitions, sharded

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies of moments and steps. Collective."""
        parts = self._partitions
        return {
            name: {key: self._sharded(parts.moment(name, key)) for key in MOMENTS}
            | {"step": torch.tensor(float(parts.client.steps))}
            for name in parts.in_order(self.names)
        }

    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Let DeepSpeed step: AdamW moves its shards, Muon's new masters become live."""
        moved = list(names)
        assert set(moved) == set(self.names), "engine=deepspeed freezes nothing"
        client = self._partitions.client
        client.due(lr)
        self._partitions.close()
        self._zero_engine.step()
        client.due(None)
        client.steps += 1
        return moved

    def skip(self) -> None:
        """Let DeepSpeed drop the gradients; nothing moves."""
        self._partitions.close()
        self._zero_engine.step()


class _WithState:
    """Muon with its state as :class:`optim.build.Optimizer` asks for it."""

    algorithm = ZeroMuon.algorithm

    def __init__(self, muon: ZeroMuon, engine: DeepSpeedEngine) -> None:
        self._muon, self._engine = muon, engine
        self.step = muon.step

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies of the momentum. Collective."""
        momenta = self._muon.momenta(self._engine.shapes)
        return {name: {"momentum": self._engine._sharded(tensor)} for name, tensor in momenta}


def _gather_together(deepspeed: ModuleType, model: nn.Module) -> None:
    """Let ZeRO 3 gather an attention or a MoE at once: what is inside them returns records."""
    for module in model.modules():
        if isinstance(module, Block):
            deepspeed.utils.set_z3_leaf_module(module.attn, True)
            deepspeed.utils.set_z3_leaf_module(module.ffn, True)


@contextlib.contextmanager
def _swapping(
    folder: SwapFolder | None, config: EngineConfig, asked: dict[str, Any]
) -> Iterator[None]:
    """Let DeepSpeed swap to a folder of this process, by reads and writes that are checked."""
    if folder is None:
        yield
        return
    for part in asked["zero_optimization"].values():
        if isinstance(part, dict) and "nvme_path" in part:
            part["nvme_path"] = folder.path
    with checked_io(config.nvme_path):
        yield


def _initialised(
    deepspeed: ModuleType, model: nn.Module, client: FlatAdamW, config: dict[str, Any]
) -> Any:
    """DeepSpeed's engine, which did take the stage that was asked for."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which extension it loaded
            engine = deepspeed.initialize(
                model=model, optimizer=client, config=config, dist_init_required=False
            )[0]
    except (ValueError, deepspeed.DeepSpeedConfigError) as error:  # pydantic's too
        text = " ".join(str(error).split())
        raise ConfigError(f"DeepSpeed refuses its configuration: {text}") from error
    asked = config["zero_optimization"]["stage"]
    if engine.zero_optimization_stage() != asked:
        raise DeepSpeedError(f"ZeRO {engine.zero_optimization_stage()} runs, {asked} was asked for")
    return engine
