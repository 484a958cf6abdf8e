"""Muon for sharded parameters (DTensor): whole matrices exist for a moment, each on one rank.

DeepSeek-V4 section 3 (reference D, Muon + ZeRO). Momentum is sharded like its parameter and updated
on the shards. Every matrix has one owner, chosen among the ranks that hold a part of it, so that
Newton-Schulz work is even and never done twice, replicas included; a matrix that some rank holds
whole stays there. Matrices go to their owners, are orthogonalised in batches of equal shape, and
the updates return to all that hold a part. Rounds bound the memory; the matrices of a round travel
while those of the round before are orthogonalised.
"""

# Legend: N matrices, R rows, C columns
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from optim.config import MuonConfig
from optim.muon import (
    CHUNK_ELEMENTS,
    Muon,
    MuonEntry,
    apply_,
    direction_,
    matmul_dtype,
    update_scale,
)
from optim.newton_schulz import (
    SymmetricProduct,
    matmul_flops,
    newton_schulz,
    whole_product,
)
from optim.offload import Transfers, streamed


class Part(NamedTuple):
    """Part of a matrix on one rank: rows and columns, half open."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> int:
        """Elements."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter, and where it is.

    Attributes:
        name: of the parameter.
        index: which of its matrices.
        rows: of the matrix.
        cols: of the matrix.
        parts: rank (in the group) -> what it holds; ranks that hold nothing are absent. Replicas
            hold equal parts.
    """

    name: str
    index: int
    rows: int
    cols: int
    parts: dict[int, Part]

    def candidates(self) -> list[int]:
        """Ranks that may own it: those that hold it whole, else all that hold a part."""
        full = [rank for rank, part in self.parts.items() if part.size == self.rows * self.cols]
        return full or list(self.parts)

    def sources(self, owner: int) -> dict[int, Part]:
        """Which ranks send which part to the owner: of equal parts only the nearest rank's."""
        chosen: dict[Part, int] = {}
        for rank, part in self.parts.items():
            other = chosen.get(part)
            if other is None or (abs(rank - owner), rank) < (abs(other - owner), other):
                chosen[part] = rank
        return {rank: part for part, rank in chosen.items()}


def assign_owners(matrices: Sequence[Matrix], num_ranks: int, num_steps: int) -> list[int]:
    """An owner for every matrix: the costliest first, each to its least loaded candidate.

    Args:
        matrices: in an order that all ranks share.
        num_ranks: ranks of the group.
        num_steps: Newton-Schulz iterations.
    """
    load = [0] * num_ranks
    owners = [0] * len(matrices)
    cost = [matmul_flops(m.rows, m.cols, num_steps) for m in matrices]
    options = [m.candidates() for m in matrices]
    for i in sorted(range(len(matrices)), key=lambda i: (len(options[i]) > 1, -cost[i], i)):
        owners[i] = min(options[i], key=lambda rank: (load[rank], rank))
        load[owners[i]] += cost[i]
    return owners


def matrices_of(entry: MuonEntry, group_rank: dict[int, int]) -> list[Matrix]:
    """Every matrix of a parameter and the ranks that hold parts of it.

    Args:
        entry: a DTensor [N, R, C], or [N * R, C] cut along its rows.
        group_rank: global rank -> rank in the group.
    """
    parameter, count = entry.parameter, entry.num_matrices
    assert isinstance(parameter, DTensor)
    mesh, shape = parameter.device_mesh, tuple(parameter.shape)
    rows = math.prod(shape[:-1]) // count
    parts: list[dict[int, Part]] = [{} for _ in range(count)]
    for place in torch.cartesian_prod(*(torch.arange(n) for n in mesh.shape)).view(-1, mesh.ndim):
        coordinate = place.tolist()
        size, offset = _compute_local_shape_and_global_offset(
            shape, mesh.shape, coordinate, parameter.placements
        )
        rank = group_rank[int(mesh.mesh[tuple(coordinate)])]
        for index, part in _parts_of_region(size, offset, rows):
            parts[index][rank] = part
    return [
        Matrix(entry.name, i, rows, shape[-1], dict(sorted(parts[i].items()))) for i in range(count)
    ]


def _parts_of_region(
    size: Sequence[int], offset: Sequence[int], rows: int
) -> Iterable[tuple[int, Part]]:
    """Matrices that a rank's region meets, and the part of each in it."""
    if math.prod(size) == 0:
        return
    left, right = offset[-1], offset[-1] + size[-1]
    if len(size) == 3:
        for index in range(offset[0], offset[0] + size[0]):
            yield index, Part(offset[1], offset[1] + size[1], left, right)
        return
    begin, end = offset[0], offset[0] + size[0]
    for index in range(begin // rows, -(-end // rows)):
        top, bottom = max(begin, index * rows), min(end, (index + 1) * rows)
        yield index, Part(top - index * rows, bottom - index * rows, left, right)


class ShardedMuon(Muon):
    """Muon over DTensors. Every rank of the group calls :meth:`step` with the same names.

    Args:
        entries: their parameters are DTensors whose meshes hold ranks of the group.
        config: the ``optim.muon`` section.
        state_dtype: of the momentum.
        group: all ranks that hold a part of any parameter.
        transfers: see :class:`optim.muon.Muon`.
        product: the same.

    Attributes:
        state: name -> {"momentum": DTensor like the parameter}.
        orthogonalised: matrices that this rank orthogonalised in the last step.
    """

    def __init__(
        self,
        entries: Sequence[MuonEntry],
        config: MuonConfig,
        state_dtype: torch.dtype,
        group: dist.ProcessGroup,
        transfers: Transfers | None = None,
        product: SymmetricProduct = whole_product,
    ) -> None:
        super().__init__(entries, config, state_dtype, transfers, product)
        self._group, self._rank = group, group.rank()
        group_rank = {rank: i for i, rank in enumerate(dist.get_process_group_ranks(group))}
        self._matrices = {e.name: matrices_of(e, group_rank) for e in entries}
        self._rounds: dict[tuple[str, ...], list[_Round]] = {}
        self.orthogonalised: list[tuple[str, int]] = []

    @torch.no_grad()
    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Move the named parameters; a missing gradient counts as zero. Collective.

        Args:
            lr: learning rate of this step.
            names: parameters of the current phase; the others and their momentum are not touched.

        Returns:
            The names moved.
        """
        moved = list(names)
        self.orthogonalised = []
        rounds = self._plan(tuple(moved))
        directions = self._directions(moved)
        for name in moved:  # decay first: what follows only subtracts updates
            entry = self.entries[name]
            local(entry.parameter).mul_(1.0 - lr * entry.weight_decay)
        arriving = rounds[0].gather(directions, self) if rounds else None
        leaving: list[_Return] = []
        for number, now in enumerate(rounds):
            arrived = arriving
            more = number + 1 < len(rounds)
            arriving = rounds[number + 1].gather(directions, self) if more else None
            assert arrived is not None
            leaving.append(now.orthogonalise(arrived, self))
            if len(leaving) > 1:  # the return of a round overlaps with the work of the next
                leaving.pop(0).apply(self, lr)
        for last in leaving:
            last.apply(self, lr)
        return moved

    def _directions(self, names: list[str]) -> dict[str, Tensor]:
        """What is to be orthogonalised, on this rank's shards, fp32."""
        momenta = [local(self.state[name]["momentum"]) for name in names]
        if self.transfers is None:
            return {n: self._direction(n, m) for n, m in zip(names, momenta, strict=True)}
        arrived = streamed(self.transfers, [[momentum] for momentum in momenta])
        found = {n: self._direction(n, m) for n, (m,) in zip(names, arrived, strict=True)}
        self.transfers.finish()
        return found

    def _direction(self, name: str, momentum: Tensor) -> Tensor:
        parameter, config = self.entries[name].parameter, self.config
        shard, grad = local(parameter), parameter.grad
        if grad is None:
            given = shard.new_zeros(()).expand(shard.shape)
        else:
            given = local(grad)
        # Where memory is what counts the direction takes the place of the gradient. With bf16
        # momentum it cannot: the gradient is read again when ``out`` is written.
        in_place = self.transfers is not None and grad is not None and given.dtype == momentum.dtype
        out = given if in_place else torch.empty_like(shard, dtype=torch.float32)
        direction_(given, momentum, config.momentum, config.nesterov, out)
        return out

    def _plan(self, names: tuple[str, ...]) -> list[_Round]:
        """Rounds of a phase: one shape each, as many matrices an owner as one batch takes."""
        if names in self._rounds:
            return self._rounds[names]
        matrices = [matrix for name in names for matrix in self._matrices[name]]
        owners = assign_owners(matrices, self._group.size(), len(self.coefficients))
        by_shape: dict[tuple[int, int], dict[int, list[Matrix]]] = {}
        for matrix, owner in zip(matrices, owners, strict=True):
            shape = (matrix.rows, matrix.cols)
            by_shape.setdefault(shape, defaultdict(list))[owner].append(matrix)
        rounds = []
        device = local(self.entries[names[0]].parameter).device.type if names else "cpu"
        for (rows, cols), owned in by_shape.items():
            size = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cpu"]) // (rows * cols))
            for start in range(0, max(map(len, owned.values())), size):
                chunk = {rank: some[start : start + size] for rank, some in owned.items()}
                rounds.append(_Round(rows, cols, {r: m for r, m in chunk.items() if m}))
        self._rounds = {names: rounds}  # phases change seldom; the last plan is enough
        return rounds

    def view(self, shard: Tensor, matrix: Matrix) -> Tensor:
        """This rank's part of a matrix, as a view [R, C] of its shard of the parameter."""
        part = matrix.parts[self._rank]
        first = next(m for m in self._matrices[matrix.name] if self._rank in m.parts)
        if shard.ndim == 3:
            return shard[matrix.index - first.index]
        start = 0
        if matrix.index > first.index:
            head = first.parts[self._rank]
            between = matrix.index - first.index - 1
            start = head.bottom - head.top + between * matrix.rows
        return shard[start : start + part.bottom - part.top]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, as a plain tensor that shares its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@dataclass
class _Arrival:
    """Matrices on their way to this rank.

    Attributes:
        received: parts, rank by rank.
        own: parts that were here already, by matrix.
        work: the exchange; None: there is none.
        sent: kept alive until the exchange ends.
    """

    received: Tensor
    own: dict[tuple[str, int], Tensor]
    work: dist.Work | None
    sent: Tensor


@dataclass
class _Return:
    """Updates on their way back to the shards."""

    owner: _Round
    received: Tensor
    own: dict[tuple[str, int], Tensor]
    work: dist.Work | None
    sent: Tensor

    def apply(self, muon: ShardedMuon, lr: float) -> None:
        """Wait, then move the shards; decay was applied before."""
        if self.work is not None:
            self.work.wait()
        scale = update_scale(self.owner.rows, self.owner.cols, muon.config)
        start = 0
        for owner, matrices in self.owner.owned.items():
            for matrix in matrices:
                part = matrix.parts.get(muon._rank)
                if part is None:
                    continue
                if owner == muon._rank:
                    update = _cut(self.own[matrix.name, matrix.index], part)
                else:
                    shape = (part.bottom - part.top, part.right - part.left)
                    update = self.received[start : start + part.size].view(shape)
                    start += part.size
                weight = muon.view(local(muon.entries[matrix.name].parameter), matrix)
                apply_(weight, update, lr, scale, weight_decay=0.0)


@dataclass(frozen=True)
class _Round:
    """Matrices of one shape that are orthogonalised at once.

    Attributes:
        rows: of every matrix.
        cols: of every matrix.
        owned: rank -> its matrices, ranks in ascending order.
    """

    rows: int
    cols: int
    owned: dict[int, list[Matrix]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "owned", dict(sorted(self.owned.items())))

    @property
    def stays(self) -> bool:
        """Whether every matrix is held by its owner alone, so that nothing travels."""
        return all(set(m.parts) == {rank} for rank, some in self.owned.items() for m in some)

    def gather(self, directions: dict[str, Tensor], muon: ShardedMuon) -> _Arrival:
        """Begin to send every part to its owner."""
        me, size = muon._rank, muon._group.size()
        own: dict[tuple[str, int], Tensor] = {}
        sending: list[Tensor] = []
        sent, received = [0] * size, [0] * size
        for owner, matrices in self.owned.items():
            for matrix in matrices:
                sources = matrix.sources(owner)
                if me in sources:
                    part = muon.view(directions[matrix.name], matrix)
                    if owner == me:
                        own[matrix.name, matrix.index] = part
                    else:
                        sending.append(part.reshape(-1))
                        sent[owner] += part.numel()
                if owner == me:
                    for rank, part in sources.items():
                        received[rank] += part.size if rank != me else 0
        arrived, work, out = self._exchange(sending, sent, received, muon, torch.float32)
        return _Arrival(arrived, own, work, out)

    def orthogonalise(self, arrival: _Arrival, muon: ShardedMuon) -> _Return:
        """Put this rank's matrices together, orthogonalise them, begin to send updates back."""
        if arrival.work is not None:
            arrival.work.wait()
        me, size = muon._rank, muon._group.size()
        mine = self.owned.get(me, [])
        updates: dict[tuple[str, int], Tensor] = {}
        device = arrival.received.device
        dtype = matmul_dtype(muon.config.dtype, device)
        if mine:
            whole_NRC = torch.empty(len(mine), self.rows, self.cols, device=device)
            self._assemble(whole_NRC, mine, arrival, me)
            update_NRC = newton_schulz(whole_NRC, muon.coefficients, dtype, muon.product)
            for matrix, update in zip(mine, update_NRC.unbind(0), strict=True):
                updates[matrix.name, matrix.index] = update
                muon.orthogonalised.append((matrix.name, matrix.index))
        sending: list[Tensor] = []
        sent, received = [0] * size, [0] * size
        for rank in range(size):
            for matrix in mine if rank != me else []:
                part = matrix.parts.get(rank)
                if part is not None:
                    cut = _cut(updates[matrix.name, matrix.index], part)
                    sending.append(cut.reshape(-1))
                    sent[rank] += part.size
        for owner, matrices in self.owned.items():
            if owner != me:
                received[owner] = sum(m.parts[me].size for m in matrices if me in m.parts)
        arrived, work, out = self._exchange(sending, sent, received, muon, dtype)
        return _Return(self, arrived, updates, work, out)

    def _assemble(self, whole_NRC: Tensor, mine: list[Matrix], arrival: _Arrival, me: int) -> None:
        start = 0
        by_rank: dict[int, list[tuple[int, Part]]] = defaultdict(list)
        for n, matrix in enumerate(mine):
            for rank, part in matrix.sources(me).items():
                by_rank[rank].append((n, part))
        for rank in sorted(by_rank):
            for n, part in by_rank[rank]:
                target = _cut(whole_NRC[n], part)
                if rank == me:
                    target.copy_(arrival.own[mine[n].name, mine[n].index])
                else:
                    target.copy_(arrival.received[start : start + part.size].view(target.shape))
                    start += part.size

    def _exchange(
        self,
        sending: list[Tensor],
        sent: list[int],
        received: list[int],
        muon: ShardedMuon,
        dtype: torch.dtype,
    ) -> tuple[Tensor, dist.Work | None, Tensor]:
        device = local(next(iter(muon.entries.values())).parameter).device
        out = torch.cat(sending) if sending else torch.empty(0, dtype=dtype, device=device)
        arrived = torch.empty(sum(received), dtype=dtype, device=device)
        if self.stays:
            return arrived, None, out
        work = dist.all_to_all_single(
            arrived, out, received, sent, group=muon._group, async_op=True
        )
        return arrived, work, out


def _cut(matrix_RC: Tensor, part: Part) -> Tensor:
    return matrix_RC[part.top : part.bottom, part.left : part.right]
