"""Which updates the audit judges by their form, and what it keeps of the weights before them.

The form of an update shows only beside the weights of before. Of a small model on a CPU every
parameter is judged; elsewhere a handful of whole matrices and one layer of each kind of the rest,
chosen anew for each step by seed and number. Of a matrix parameter one matrix is kept whole, of
the others elements spread over the whole tensor. All of it is fp32 and stays on its device;
samples live from the backward pass to the end of the step. That parameters move, and by whom, is
seen of all (``parallel/pieces.py``).
"""

# Legend: R rows, C columns, N elements
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.groups import Owner, ParamRecord
from parallel.collectives import local
from parallel.pieces import FINGERPRINT_BYTES, largest_of, norms_of, rows_of


@dataclass(frozen=True)
class SampleSize:
    """How much is judged in one step.

    Attributes:
        whole_bytes: of a rank's weights, up to which every parameter is judged.
        matrices: of larger models, how many are kept whole at most.
        matrix_bytes: of these together, unless one alone has more.
        elements: of one parameter on a rank, where its update is elementwise.
    """

    whole_bytes: int
    matrices: int
    matrix_bytes: int
    elements: int


_BY_MATRIX = {Owner.muon}  # their form shows only on whole matrices
SAMPLE_SIZES = {
    "cpu": SampleSize(whole_bytes=1 << 29, matrices=8, matrix_bytes=1 << 28, elements=1 << 22),
    "cuda": SampleSize(whole_bytes=0, matrices=8, matrix_bytes=1 << 28, elements=1 << 18),
}


@dataclass(frozen=True)
class MatrixSample:
    """A whole matrix [R, C] of a parameter; collective over the ranks that hold parts of it.

    Attributes:
        before: as it was before the update, fp32; used up by judging it.
        largest: absolute value in it.
        told: which one it is, for the receipt.
        start: its first row in the parameter's first dim.
        stop: the row behind its last.
    """

    before: Tensor
    largest: float
    told: str
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same matrix of another tensor."""
        return _matrix(tensor, self.start, self.stop)


@dataclass(frozen=True)
class ElementSample:
    """Every n-th element [N] of what lies on this rank.

    Attributes:
        before: as they were before the update, fp32; used up by judging them.
        largest: absolute value among them, on any rank.
        told: which they are, for the receipt.
        first: of them.
        stride: to the next.
    """

    before: Tensor
    largest: float
    told: str
    first: int
    stride: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of another tensor, where the first ones lie (state may rest away)."""
        return _elements(tensor, self.first, self.stride).to(self.before.device)


AuditSample = MatrixSample | ElementSample


def take(
    weight: Tensor,
    gradient: Tensor,
    norms: Tensor,
    record: ParamRecord,
    size: SampleSize,
    seed: int,
) -> AuditSample:
    """What is judged of a parameter, before its update. Collective.

    Args:
        weight: what the update moves.
        gradient: of the step.
        norms: of the gradient, by matrix of a stack, else of the whole; finite.
        record: owner, and how the parameter is cut.
        size: how many elements.
        seed: of the choice.
    """
    if record.owner not in _BY_MATRIX:
        return _spread(weight, size, seed)
    count = record.num_matrices
    rows = weight.shape[0] // count
    if len(norms) == count:  # of an expert that got few tokens rounding shows, and no more
        able = (norms >= 0.5 * norms.max()).nonzero().flatten().tolist()
        which = able[seed % len(able)]
    else:
        order = [(seed + i) % count for i in range(count)]
        moved = (i for i in order if norms_of(rows_of(gradient, i * rows, (i + 1) * rows), False))
        which = next(moved, order[0])
    start, stop = which * rows, (which + 1) * rows
    before = _matrix(weight, start, stop)
    if not isinstance(weight, DTensor):
        before = before.clone()
    return MatrixSample(before, largest_of(before), f"matrix {which} of {count}", start, stop)


def _spread(weight: Tensor, size: SampleSize, seed: int) -> ElementSample:
    """Elements from everywhere in the part that lies here."""
    stride = -(-max(1, local(weight).numel()) // size.elements)
    stride += 1 - stride % 2  # rows have an even length: columns take turns
    first = seed % stride
    before = _elements(weight, first, stride).clone()
    told = "all elements" if stride == 1 else f"every {stride}th element from {first}"
    return ElementSample(before, largest_of(weight, before), told, first, stride)


def chosen(
    names: Set[str], records: Mapping[str, ParamRecord], size: SampleSize, whole: bool, seed: int
) -> set[str]:
    """Parameters whose update is judged in a step.

    Args:
        names: that can be.
        records: of all parameters.
        size: how much is judged.
        whole: the model is small enough for all of them.
        seed: other steps and starts look at other layers, and at other matrices.
    """
    if whole:
        return set(names)
    one = one_of_each_kind(names, seed)
    matrices = sorted((n for n in one if records[n].owner in _BY_MATRIX), key=_kind)
    begin = seed * size.matrices % max(1, len(matrices))
    taken, room = set[str](), size.matrix_bytes
    for name in (matrices[begin:] + matrices[:begin])[: size.matrices]:
        room -= _matrix_bytes(records[name])
        if room >= 0 or not taken:
            taken.add(name)
    return (one - set(matrices)) | taken


def one_of_each_kind(names: Set[str], seed: int) -> set[str]:
    """One layer's parameter of each kind, chosen by ``seed``."""
    of_kind: dict[str, list[str]] = {}
    for name in sorted(names):
        of_kind.setdefault(_kind(name), []).append(name)
    return {alike[seed % len(alike)] for alike in of_kind.values()}


def sample_bytes(records: Iterable[ParamRecord], size: SampleSize, weights: float) -> int:
    """Bytes at most that samples take on a rank, with what comparing one of them takes.

    Args:
        records: of the parameters that live there.
        size: how much is judged.
        weights: bytes of the rank's weights.
    """
    whole = weights <= size.whole_bytes
    matrices, elements = dict[str, int](), dict[str, int]()
    for record in records:
        kind = record.name if whole else _kind(record.name)
        if record.owner in _BY_MATRIX:
            matrices[kind] = max(matrices.get(kind, 0), _matrix_bytes(record))
        else:
            kept = 4 * min(math.prod(record.shape), size.elements)
            elements[kind] = max(elements.get(kind, 0), kept)
    largest = sorted(matrices.values(), reverse=True)
    kept = sum(largest)
    if not whole:
        kept = min(sum(largest[: size.matrices]), max([size.matrix_bytes, *largest[:1]]))
    # Compared are: the matrix of after, the Gram matrix and a product; or two moments, the formula,
    # the elements of after and a mask. Fingerprints are taken of chunks.
    compared = max([3 * n for n in largest[:1]] + [5 * n for n in elements.values()], default=0)
    return kept + sum(elements.values()) + max(compared, FINGERPRINT_BYTES)


def _matrix_bytes(record: ParamRecord) -> int:
    return 4 * math.prod(record.shape) // record.num_matrices


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _matrix(tensor: Tensor, start: int, stop: int) -> Tensor:
    return rows_of(tensor, start, stop).flatten(0, -2).float()


def _elements(tensor: Tensor, first: int, stride: int) -> Tensor:
    return local(tensor).detach().reshape(-1)[first::stride].float()
