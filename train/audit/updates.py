"""What an update looks like, by algorithm: orthogonal for Muon, its formula for AdamW.

An optimizer without a line in ``UPDATES`` is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.parameter_counts import parameter_shapes
from optim.config import AdamWConfig
from optim.groups import Owner, build_table
from optim.muon import update_scale
from parallel.collectives import local
from parallel.pieces import largest_of, total_of
from train.audit.evidence import Evidence
from train.audit.orthogonal import largest_singular_value, most_asked_for
from train.audit.samples import AuditSample
from train.config.schema import RunConfig
from train.errors import UserError

# Share that U - U U^T U has of the energy of U: (1 - s^2)^2 for a singular value s. Five steps of
# Newton-Schulz leave s in 0.7 .. 1.2, which gives 0.26 at most; 0.5 and 1.5 give 0.56 and 1.6.
_FLAT = 0.5
# Of the largest singular value: 0.02 for products in bf16 (a few roundings of 2^-9), 0.04 for the
# rounding of W, whose elements are _LOST_DIGITS of the update's at most and independent.
_LOUD = 0.06
_LOST_DIGITS = 0.02  # rounding of W beside its update, above which an update cannot be judged
_EPS = torch.finfo(torch.float32).eps
_LEAST_SQUARE = 1e-35  # fp32 and bf16 lose digits below 1e-38
_CHUNK = 1 << 20  # elements of a state looked at once
# fp32 knows W (1 - lr wd), in the update and here, and the sum of the update to half of this each.
_ROUNDINGS = 1.5 * _EPS


@dataclass(frozen=True)
class KnownUpdate:
    """What the audit knows of the updates of an algorithm.

    Attributes:
        form: faults of the update of a parameter, by its sample and its weight after the step.
        usual: its usual element, as a multiple of the learning rate.
        largest: about the largest element of the update just done, as such a multiple.
    """

    form: Callable[[Evidence, str, AuditSample, Tensor], Iterator[str]]
    usual: Callable[[Evidence, str], float]
    largest: Callable[[Evidence, str], float]


def lr_to_judge(e: Evidence, name: str) -> float:
    """Learning rate from which an update stands out of the rounding of the weight itself."""
    usual = UPDATES[e.records[name].owner].usual(e, name)
    return _EPS * e.samples[name].largest / (_LOST_DIGITS * usual)


def check_audited(run: RunConfig) -> None:
    """Refuse an optimizer whose updates nothing here would judge.

    Raises:
        UserError: names it, and what lacks.
    """
    table = build_table(parameter_shapes(run.model), run.optim, run.model.split_counts)
    for owner in sorted({record.owner for record in table} - UPDATES.keys()):
        raise UserError(
            f"optim.name={run.optim.name.value}: the audit does not know what an update of"
            f" {owner.value} looks like; it needs a line in UPDATES of train/audit/updates.py"
        )


def _muon_size(e: Evidence, name: str) -> float:
    """Root mean square of an update of full rank."""
    record = e.records[name]
    rows, cols = math.prod(record.shape[:-1]) // record.num_matrices, record.shape[-1]
    return update_scale(rows, cols, e.run.optim.muon) / math.sqrt(max(rows, cols))


def _adamw_size(e: Evidence, name: str) -> float:
    """A chunk at a time: a tensor of this size may have no room."""
    config, state = e.run.optim.adamw, e.optimizer_after[name]
    steps = float(local(state["step"]))
    moments = [local(state[key]).detach().reshape(-1) for key in ("exp_avg", "exp_avg_sq")]
    most = moments[0].new_zeros(1, dtype=torch.float32)
    for first, second in zip(*(moment.split(_CHUNK) for moment in moments), strict=True):
        step = _adamw_step(first.float(), second.float(), config, steps)
        most = torch.maximum(most, torch.linalg.vector_norm(step, math.inf))
    return largest_of(state["exp_avg"], most)


def _adamw_step(first: Tensor, second: Tensor, config: AdamWConfig, steps: float) -> Tensor:
    """The update that moments ask for, as a multiple of the learning rate; fp32."""
    root = (second / (1 - config.betas[1] ** steps)).sqrt_().add_(config.eps)
    return (first / (1 - config.betas[0] ** steps)).div_(root)


def _muon_form(e: Evidence, name: str, sample: AuditSample, after: Tensor) -> Iterator[str]:
    record, lr = e.records[name], e.step.lr
    rows, cols = sample.before.shape
    scale = update_scale(rows, cols, e.run.optim.muon)
    update = sample.before.mul_(1 - lr * record.weight_decay).sub_(sample.of(after))
    energy, off = distance_from_orthogonal(update.div_(lr * scale))
    if not (energy > 0 and off <= _FLAT):
        yield (
            f"{name}: muon was asked for, but {off:.2g} of the update's energy is off an orthogonal"
            f" matrix (at most {_FLAT})"
        )
    most, asked = largest_singular_value(update), most_asked_for(e.run.optim.muon)
    if not most <= asked + _LOUD:
        yield (
            f"{name}: the update's largest singular value is {most:.3g}, but the iterations of"
            f" optim.muon.newton_schulz leave {asked:.3g} at most"
        )


def distance_from_orthogonal(update_RC: Tensor) -> tuple[float, float]:
    """Energy of U, and the share that U - U U^T U has of it: 0 where singular values are 0 or 1.

    In fp32. Columns of U have a norm near 1, so that an element of a product of n terms is off by
    ``n 2^-24`` at most, and U U^T U by ``sqrt(r) n 2^-23`` of its norm for r columns: 0.12 for
    V4-Flash's largest [32768, 1024] if all roundings went one way, and else a thousandth.
    """
    tall = update_RC if update_RC.shape[0] >= update_RC.shape[1] else update_RC.T
    off = (tall @ (tall.T @ tall)).sub_(tall)
    energy = float(root_sum_square(tall)) ** 2
    return energy, float(root_sum_square(off)) ** 2 / max(energy, 1e-30)


def root_sum_square(x: Tensor) -> Tensor:
    """Euclidean norm in fp32, by rows and then over rows.

    No sum has more than about ``2 sqrt(n)`` terms, so it is off by ``sqrt(n) 2^-23`` at most,
    5e-4 for 2^24 elements, in whatever order a device adds them.
    """
    flat = x.reshape(-1)
    width = max(1, math.isqrt(flat.numel()))
    body = flat.numel() // width * width
    rows = torch.linalg.vector_norm(flat[:body].view(-1, width), dim=1)
    rest = torch.linalg.vector_norm(flat[body:])
    return torch.linalg.vector_norm(torch.cat([rows, rest[None]]))


def _adamw_form(e: Evidence, name: str, sample: AuditSample, after: Tensor) -> Iterator[str]:
    """Every rank compares the part that it holds."""
    state = e.optimizer_after[name]
    if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
        yield f"{name}: adamw was asked for, but its state holds {sorted(state)}"
        return
    lr, decay, steps = e.step.lr, e.records[name].weight_decay, float(local(state["step"]))
    first, second = sample.of(state["exp_avg"]), sample.of(state["exp_avg_sq"])
    # A gradient near 0 has a square that storage cannot hold; the update knew it in full.
    lost = (second < _LEAST_SQUARE) & (first != 0)
    expected = _adamw_step(first, second, e.run.optim.adamw, steps).masked_fill_(lost, 0.0)
    norms = [root_sum_square(sample.before), root_sum_square(expected)]
    got = sample.before.mul_(1 - lr * decay).sub_(sample.of(after)).div_(lr)
    norms.append(root_sum_square(got.masked_fill_(lost, 0.0).sub_(expected)))
    weight, size, off = total_of(after, torch.stack(norms).square()).sqrt().tolist()
    error = max(off - _ROUNDINGS * weight / lr, 0.0) / max(size, 1e-30)  # less what W may hide
    if not error <= 0.1:  # bf16 state: 1e-2
        yield f"{name}: adamw was asked for, but the update is {error:.2g} off its formula"


# Without a line here an optimizer is refused: it could be any other, and nobody would notice.
UPDATES: dict[Owner, KnownUpdate] = {
    Owner.muon: KnownUpdate(_muon_form, _muon_size, _muon_size),
    Owner.adamw: KnownUpdate(_adamw_form, lambda e, name: 1.0, _adamw_size),
}
