"""Muon: momentum, orthogonalised per matrix, with decoupled weight decay.

DeepSeek-V4 section 2.4, algorithm 1:

    M <- mu M + G;   U <- HybridNS(mu M + G);   W <- W (1 - lr wd) - lr rms sqrt(max(n, m)) U

``optim.muon.scale=original`` takes ``sqrt(max(1, n / m))`` of [n, m] for ``rms sqrt(max(n, m))``.
The maths is three functions: :func:`direction_` and :func:`apply_` are elementwise, so they work
on any shard, and :func:`optim.newton_schulz.newton_schulz` needs whole matrices. :class:`Muon`
strings them together where each rank holds whole parameters; a sharded version gathers between the
first and the second and scatters before the third.
"""

# Legend: N matrices, R rows, C columns
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from optim.config import MatmulDtype, MuonConfig, UpdateScale
from optim.newton_schulz import (
    Coefficients,
    SymmetricProduct,
    newton_schulz,
    whole_product,
)
from optim.offload import Transfers, resting_zeros, streamed
from optim.owned import OwnedParameter

# Elements orthogonalised in one call. On a CPU a chunk has to stay in cache through all
# iterations; a GPU wants large batches and is bounded by the memory of the workspace.
CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}


@dataclass(frozen=True)
class MuonEntry(OwnedParameter):
    """A parameter that Muon owns; cut along its first dim into matrices.

    Attributes:
        num_matrices: independent matrices in it.
    """

    num_matrices: int = field(kw_only=True)


class Muon:
    """Muon over whole parameters; matrices of equal shape are orthogonalised together.

    Args:
        entries: its parameters.
        config: the ``optim.muon`` section.
        state_dtype: of the momentum.
        transfers: momentum rests in host memory, and travels by these; None: on the device.
        product: forms the symmetric products of Newton-Schulz.

    Attributes:
        state: name -> {"momentum": tensor shaped like the parameter}.
    """

    algorithm = "muon"

    def __init__(
        self,
        entries: Sequence[MuonEntry],
        config: MuonConfig,
        state_dtype: torch.dtype,
        transfers: Transfers | None = None,
        product: SymmetricProduct = whole_product,
    ) -> None:
        self.config, self.transfers, self.product = config, transfers, product
        self.coefficients = expand(config)
        self.entries = {entry.name: entry for entry in entries}
        self.state = {
            entry.name: {"momentum": resting_zeros(entry.parameter, state_dtype, transfers)}
            for entry in entries
        }

    @torch.no_grad()
    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Move the named parameters; a missing gradient counts as zero.

        Args:
            lr: learning rate of this step.
            names: parameters of the current phase; the others and their momentum are not touched.

        Returns:
            The names moved.
        """
        buckets: dict[tuple[torch.device, torch.Size], list[_Piece]] = {}
        moved = []
        for name in names:
            piece = _piece(self.entries[name], self.state[name]["momentum"])
            buckets.setdefault((piece.grad.device, piece.weight.shape[1:]), []).append(piece)
            moved.append(name)
        for (device, shape), pieces in buckets.items():
            per_chunk = max(1, CHUNK_ELEMENTS.get(device.type, 2**19) // shape.numel())
            for chunk in self._here(list(_chunks(pieces, per_chunk))):
                self._step_chunk(chunk, lr)
        if self.transfers is not None:
            self.transfers.finish()
        return moved

    def _here(self, chunks: list[list[_Piece]]) -> Iterator[list[_Piece]]:
        """Each chunk with all its tensors on the device."""
        if self.transfers is None:
            yield from chunks
            return
        resting = [[t for piece in chunk for t in piece.resting()] for chunk in chunks]
        for chunk, tensors in zip(chunks, streamed(self.transfers, resting), strict=True):
            travelled = iter(tensors)
            yield [
                replace(
                    piece,
                    momentum=next(travelled),
                    weight=piece.weight if piece.live is None else next(travelled),
                )
                for piece in chunk
            ]

    def _step_chunk(self, chunk: list[_Piece], lr: float) -> None:
        config, first = self.config, chunk[0].weight
        counts = [len(piece.weight) for piece in chunk]
        rows, cols = first.shape[1:]
        direction_NRC = first.new_empty(sum(counts), rows, cols, dtype=torch.float32)
        for piece, out in zip(chunk, direction_NRC.split(counts), strict=True):
            direction_(piece.grad, piece.momentum, config.momentum, config.nesterov, out)
        dtype = matmul_dtype(config.dtype, first.device)
        update_NRC = newton_schulz(direction_NRC, self.coefficients, dtype, self.product)
        scale = update_scale(rows, cols, config)
        for piece, update in zip(chunk, update_NRC.split(counts), strict=True):
            apply_(piece.weight, update, lr, scale, piece.weight_decay)
            if piece.live is not None:
                piece.live.copy_(piece.weight)


def direction_(grad: Tensor, momentum: Tensor, mu: float, nesterov: bool, out: Tensor) -> None:
    """``M <- mu M + G`` in place, then ``out <- mu M + G`` (Nesterov) or ``M``; elementwise, fp32.

    Args:
        grad: any shape; broadcast, so that an expanded 0 stands for a missing gradient.
        momentum: fp32 or bf16 storage.
        mu: momentum coefficient.
        nesterov: look one step ahead.
        out: fp32, shaped like ``momentum``.
    """
    new = momentum if momentum.dtype == torch.float32 else out
    torch.add(grad, momentum.to(torch.float32), alpha=mu, out=new)
    momentum.copy_(new)
    torch.add(grad, new, alpha=mu, out=out) if nesterov else out.copy_(new)


def apply_(weight: Tensor, update: Tensor, lr: float, scale: float, weight_decay: float) -> None:
    """``W <- W (1 - lr wd) - lr scale U`` in place. Elementwise."""
    weight.mul_(1.0 - lr * weight_decay).add_(update, alpha=-lr * scale)


def update_scale(rows: int, cols: int, config: MuonConfig) -> float:
    """Factor of an orthogonal [rows, cols] matrix, before the learning rate.

    ``rms`` gives a matrix of full rank that root mean square; ``original`` (Jordan 2024) bounds how
    far the output of ``x W^T`` moves, per root mean square of x.
    """
    if config.scale == UpdateScale.original:
        return math.sqrt(max(1.0, rows / cols))
    return config.rms * math.sqrt(max(rows, cols))


def expand(config: MuonConfig) -> list[Coefficients]:
    """(a, b, c) of each iteration, in order."""
    return [(s.a, s.b, s.c) for s in config.newton_schulz for _ in range(s.steps)]


def matmul_dtype(choice: MatmulDtype, device: torch.device) -> torch.dtype:
    """Dtype of the Newton-Schulz matmuls on a device."""
    choice = MatmulDtype(choice)
    if choice is MatmulDtype.auto:
        choice = MatmulDtype.bf16 if _multiplies_bf16(device) else MatmulDtype.fp32
    return torch.bfloat16 if choice is MatmulDtype.bf16 else torch.float32


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@dataclass(frozen=True)
class _Piece:
    """Matrices of one parameter, as views [N, R, C] into its storage.

    ``live`` is what the model reads, where ``weight`` is a master in host memory.
    """

    weight: Tensor
    momentum: Tensor
    grad: Tensor
    weight_decay: float
    live: Tensor | None

    def cut(self, start: int, stop: int) -> _Piece:
        part = slice(start, stop)
        live = None if self.live is None else self.live[part]
        return _Piece(
            self.weight[part], self.momentum[part], self.grad[part], self.weight_decay, live
        )

    def resting(self) -> list[Tensor]:
        """What lies in host memory, if momentum does."""
        return [self.momentum] if self.live is None else [self.momentum, self.weight]


def _piece(entry: MuonEntry, momentum: Tensor) -> _Piece:
    weight, grad = entry.parameter.detach(), entry.parameter.grad
    shape = (entry.num_matrices, -1, weight.shape[-1])
    grad = weight.new_zeros(()).expand(weight.shape) if grad is None else grad
    # view, not reshape: a copy of the weight would be moved in vain.
    master = weight.view(shape) if entry.master is None else entry.master.view(shape)
    live = None if entry.master is None else weight.view(shape)
    return _Piece(master, momentum.view(shape), grad.reshape(shape), entry.weight_decay, live)


def _chunks(pieces: list[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Cut the pieces, in order, into lists of ``size`` matrices each; the last has the rest."""
    chunk: list[_Piece] = []
    room = size
    for piece in pieces:
        start, total = 0, len(piece.weight)
        while start < total:
            stop = min(total, start + room)
            chunk.append(piece.cut(start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk
