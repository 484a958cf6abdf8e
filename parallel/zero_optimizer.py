"""The optimizer under DeepSpeed's ZeRO: our Muon on whole matrices, our AdamW on flat shards.

ZeRO 1 to 3 keep the fp32 masters of a parameter group as one flat vector, cut over the ranks. AdamW
is elementwise, so it moves those shards as they are (:class:`FlatAdamW` is what DeepSpeed calls).
Muon needs matrices: :class:`ZeroMuon` reads whole gradients after the backward pass and sets new
masters before DeepSpeed's step, whose group for them moves nothing. A master that is set after that
step would reach the next forward pass one step late.
"""

# Legend: N matrices, R rows, C columns
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from optim.config import AdamWConfig, MuonConfig
from optim.groups import Owner, ParamRecord
from optim.muon import CHUNK_ELEMENTS, apply_, direction_, expand, matmul_dtype, update_scale
from optim.newton_schulz import SymmetricProduct, newton_schulz
from parallel.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW(torch.optim.Optimizer):
    """What DeepSpeed steps: AdamW over its flat fp32 shards; Muon's groups stay as they are.

    Outside of :meth:`due` a step moves nothing, so that DeepSpeed's own calls (at its start, at a
    step that is skipped) change neither weights nor moments.

    Args:
        parameters: by name.
        table: owner and decay of each.
        config: the ``optim.adamw`` section.

    Attributes:
        steps: that were applied.
        scale: factor of the gradients, from clipping.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], table: Sequence[ParamRecord], config: AdamWConfig
    ) -> None:
        kinds: dict[tuple[Owner, float], list[Parameter]] = {}
        for record in table:
            decay = 0.0 if record.owner is Owner.muon else record.weight_decay
            kinds.setdefault((record.owner, decay), []).append(parameters[record.name])
        groups = [
            {"params": params, "weight_decay": decay, "owner": owner.value}
            for (owner, decay), params in kinds.items()
        ]
        super().__init__(groups, {"lr": 0.0})
        self._config = config
        self._lr: float | None = None
        self.steps, self.scale = 0, 1.0

    def due(self, lr: float | None) -> None:
        """Let the steps until the next call move AdamW's shards by this learning rate; None: no."""
        self._lr = lr
        for group in self.param_groups:
            group["lr"] = lr or 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move the shards of AdamW's groups, if a step is due."""
        assert closure is None
        for group in self.param_groups:
            if group["owner"] != Owner.adamw.value:
                continue
            for flat in group["params"]:
                state = self.moments(flat)
                if self._lr is not None and flat.numel():
                    self._move(flat, state, group["weight_decay"])

    def moments(self, flat: Tensor) -> dict[str, Tensor]:
        """The moments of a flat shard, zeros from the start."""
        state = self.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat.detach())
        return state

    def _move(self, flat: Tensor, state: dict[str, Tensor], weight_decay: float) -> None:
        assert flat.grad is not None, "DeepSpeed gave no gradient for a shard"
        assert self._lr is not None
        if self.scale != 1.0:
            flat.grad.mul_(self.scale)
        steps = torch.tensor(float(self.steps), device=flat.device)  # counted up by adamw
        adamw(
            [flat.detach()], [flat.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [steps],
            fused=flat.device.type in ("cpu", "cuda"), amsgrad=False,
            beta1=self._config.betas[0], beta2=self._config.betas[1], lr=self._lr,
            weight_decay=weight_decay, eps=self._config.eps, maximize=False,
        )  # fmt: skip


class Masters(Protocol):
    """Where :class:`ZeroMuon` reads gradients and sets masters: ``zero_partitions.Partitions``."""

    client: FlatAdamW

    def gradient(self, name: str) -> Tensor:
        """The whole reduced gradient."""
        ...

    def master(self, name: str) -> Tensor:
        """A whole copy of the fp32 master."""
        ...

    def set_master(self, name: str, value: Tensor) -> None:
        """Set the fp32 master."""
        ...


@dataclass(frozen=True)
class _Round:
    """Parameters whose matrices, all of one shape, are orthogonalised at once over the ranks."""

    records: list[ParamRecord]
    rows: int
    cols: int

    @property
    def num_matrices(self) -> int:
        return sum(record.num_matrices for record in self.records)

    def share(self, ranks: int) -> int:
        """Matrices of a rank; the last ranks may have fewer."""
        return -(-self.num_matrices // ranks)


class ZeroMuon:
    """Muon on whole matrices, each orthogonalised on one rank, which keeps its momentum.

    Args:
        table: the parameters that Muon owns.
        config: the ``optim.muon`` section.
        partitions: where gradients are read and masters set.
        group: the data ranks.
        device: where to orthogonalise.
        home: where momentum stays between steps (``cpu`` with an offloaded optimizer).
        product: forms the symmetric products of Newton-Schulz.

    Attributes:
        orthogonalised: matrices that this rank orthogonalised in the last step.
    """

    algorithm = "muon"

    def __init__(
        self,
        table: Sequence[ParamRecord],
        config: MuonConfig,
        partitions: Masters,
        group: dist.ProcessGroup,
        device: torch.device,
        home: torch.device,
        product: SymmetricProduct,
    ) -> None:
        self._config, self._partitions, self._group = config, partitions, group
        self._product = product
        self._coefficients, self._device, self._home = expand(config), device, home
        self._rounds = _rounds(table, group.size() * CHUNK_ELEMENTS[device.type])
        self._momentum = [
            torch.zeros(now.share(group.size()), now.rows, now.cols, device=home)
            for now in self._rounds
        ]
        self._names = {record.name for record in table}
        self.orthogonalised: list[tuple[str, int]] = []

    @torch.no_grad()
    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Set new masters of all matrices; DeepSpeed's step, which follows, makes them live."""
        moved = list(names)
        assert set(moved) == self._names, "engine=deepspeed freezes nothing"
        self.orthogonalised = []
        for now, momentum in zip(self._rounds, self._momentum, strict=True):
            self._step_round(now, momentum, lr)
        return moved

    def _step_round(self, now: _Round, momentum_NRC: Tensor, lr: float) -> None:
        config, share = self._config, len(momentum_NRC)
        first = self._group.rank() * share
        direction_NRC = torch.zeros(momentum_NRC.shape, device=self._device)
        own = momentum_NRC.to(self._device)
        start = 0
        for record in now.records:
            grad_NRC = self._partitions.gradient(record.name)
            grad_NRC = grad_NRC.reshape(record.num_matrices, now.rows, now.cols)
            for i in range(record.num_matrices):
                mine = start + i - first
                if 0 <= mine < share:
                    grad = grad_NRC[i] * self._partitions.client.scale
                    direction_(
                        grad, own[mine], config.momentum, config.nesterov, direction_NRC[mine]
                    )
                    self.orthogonalised.append((record.name, i))
            start += record.num_matrices
        if own is not momentum_NRC:
            momentum_NRC.copy_(own)
        dtype = matmul_dtype(config.dtype, self._device)
        update_NRC = self._from_all(
            newton_schulz(direction_NRC, self._coefficients, dtype, self._product)
        )
        scale, start = update_scale(now.rows, now.cols, config), 0
        for record in now.records:
            master = self._partitions.master(record.name)
            update = update_NRC[start : start + record.num_matrices].view(master.shape)
            apply_(master, update, lr, scale, record.weight_decay)
            self._partitions.set_master(record.name, master)
            start += record.num_matrices

    def _from_all(self, mine_NRC: Tensor) -> Tensor:
        """Every rank's matrices, in the order of the ranks."""
        out = mine_NRC.new_empty(self._group.size() * len(mine_NRC), *mine_NRC.shape[1:])
        dist.all_gather_single(out, mine_NRC.contiguous(), group=self._group)
        return out

    def momenta(self, shapes: Mapping[str, Sequence[int]]) -> Iterable[tuple[str, Tensor]]:
        """Whole momentum of each parameter, in turn. Collective."""
        for now, momentum in zip(self._rounds, self._momentum, strict=True):
            whole_NRC, start = self._from_all(momentum.to(self._device)), 0
            for record in now.records:
                part = whole_NRC[start : start + record.num_matrices]
                yield record.name, part.view(*shapes[record.name])
                start += record.num_matrices

    def set_momenta(self, whole: Callable[[str], Tensor]) -> None:
        """Take up saved momentum; ``whole`` gives that of a name. Collective."""
        for now, momentum_NRC in zip(self._rounds, self._momentum, strict=True):
            first, start = self._group.rank() * len(momentum_NRC), 0
            for record in now.records:
                saved = whole(record.name).reshape(record.num_matrices, now.rows, now.cols)
                for i in range(record.num_matrices):
                    if 0 <= (mine := start + i - first) < len(momentum_NRC):
                        momentum_NRC[mine].copy_(saved[i])
                start += record.num_matrices


def _rounds(table: Sequence[ParamRecord], elements: int) -> list[_Round]:
    """Parameters of one matrix shape together, up to so many elements at once."""
    by_shape: dict[tuple[int, int], list[ParamRecord]] = {}
    for record in table:
        rows = math.prod(record.shape[:-1]) // record.num_matrices
        by_shape.setdefault((rows, record.shape[-1]), []).append(record)
    rounds = []
    for (rows, cols), records in by_shape.items():
        some: list[ParamRecord] = []
        for record in records:
            if some and sum(r.num_matrices for r in (*some, record)) * rows * cols > elements:
                rounds.append(_Round(some, rows, cols))
                some = []
            some.append(record)
        rounds.append(_Round(some, rows, cols))
    return rounds


def same_step(steps: Mapping[str, Tensor]) -> int:
    """How often AdamW moved its parameters, which ZeRO's flat shards must have in common.

    Raises:
        ConfigError: they moved unequally often, as after a phase that froze some.
    """
    counts = {name: int(step) for name, step in steps.items()}
    least, most = (f(counts, key=lambda n: counts[n]) for f in (min, max)) if counts else ("", "")
    if counts and counts[least] != counts[most]:
        raise ConfigError(
            f"engine.name=deepspeed keeps one count of AdamW steps, but the checkpoint has"
            f" {counts[least]} for {least} and {counts[most]} for {most}: go on with"
            " engine=torch"
        )
    return counts[most] if counts else 0
