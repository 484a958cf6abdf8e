"""What the audit holds against what was asked for (reference P.2, Honest).

Each check looks at the evidence of one step, which is what ran: gradients, bits before and after
the update, outputs of the seams beside those of the plain ops. It yields one line a fault. To add a
check, write it and add a line to one of the two tables at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.config import LayerKind
from optim.groups import Owner
from parallel.pieces import largest_of, norms_of
from train.audit.evidence import Check, Evidence
from train.audit.passes import compiled, kernels, pipeline, precision, quant, recompute
from train.audit.updates import UPDATES, lr_to_judge

_EPS = torch.finfo(torch.float32).eps
_LOST_MOMENTUM = 0.02  # of its norm; bf16 storage rounds by 2^-9


# ---- who moves what -----------------------------------------------------------------------------
def tracked(e: Evidence) -> Iterator[str]:
    """Autograd tracks what trains, and nothing else."""
    for name, _ in e.model.named_parameters():
        if name in e.trained and name not in e.requires_grad:
            yield f"{name} should train in this phase but is frozen (requires_grad=False)"
        if name not in e.trained and name in e.grad_norms:
            yield f"{name} is frozen in this phase but received a gradient"


def early(e: Evidence) -> Iterator[str]:
    """Nothing moves before the update."""
    for name in sorted(e.early):
        yield f"{name} moved before the update: during the forward or the backward pass"


def frozen(e: Evidence) -> Iterator[str]:
    """Frozen parameters keep every bit, optimizer state included."""
    for name, _ in e.model.named_parameters():
        if name not in e.trained and name in e.changed:
            yield f"{name} is frozen in this phase but moved"
    for state in sorted(e.changed_states):
        name, _, key = state.rpartition(".")
        yield f"{name} is frozen in this phase but its optimizer state {key} moved"


def owner(e: Evidence) -> Iterator[str]:
    """Every trained parameter was moved, by the algorithm that was asked for."""
    if not e.applied:
        return
    for name in sorted(e.trained):
        if e.has_gradient(name) and name not in e.changed:
            largest = UPDATES[e.records[name].owner].largest(e, name)
            if e.step.lr * largest <= _EPS * largest_of(e.weights[name]):
                continue  # rounded away, as at the first steps of a long warm-up
            yield f"{name} received a gradient but did not move: no optimizer owns it"
            continue
        asked = e.records[name].owner.value
        ran = e.moved.get(name, "nothing")
        if ran != asked:
            yield f"{name}: {ran} moved it, but {asked} was asked for"


def algorithm(e: Evidence) -> Iterator[str]:
    """The update itself has the form of the algorithm: orthogonal for Muon, AdamW's formula."""
    if not e.applied:
        return
    for name, sample in sorted(e.samples.items()):
        if e.step.lr >= lr_to_judge(e, name):
            yield from UPDATES[e.records[name].owner].form(e, name, sample, e.weights[name])


def momentum(e: Evidence) -> Iterator[str]:
    """``M <- mu M + G`` from zero leaves the clipped gradient: seen at a run's first step."""
    if not e.applied or e.step.number != 1:
        return
    clip = e.run.optim.grad_clip
    scale = min(1.0, clip / e.update.grad_norm) if clip > 0 else 1.0
    for name in sorted(e.trained):
        if e.records[name].owner is Owner.muon and e.has_gradient(name):
            got = float(norms_of(e.optimizer_after[name]["momentum"], False).norm())
            asked = scale * float(e.grad_norms[name].norm())
            if not abs(got - asked) <= _LOST_MOMENTUM * asked:
                yield (
                    f"{name}: the first step leaves {got / asked:.3g} times its clipped gradient as"
                    " momentum, but muon adds it up whole"
                )


def live(e: Evidence) -> Iterator[str]:
    """The next forward pass reads what the update set."""
    for name in e.stale:
        yield f"{name}: the next forward pass reads another value than its master's"


# ---- the objective ------------------------------------------------------------------------------
def objective(e: Evidence) -> Iterator[str]:
    """The total that was minimised is the sum of its parts under the weights asked for."""
    losses, weights = e.shares.losses, e.step.weights
    config = e.run.model
    csa = sum(config.kind(i) is LayerKind.csa for i in range(config.num_hidden_layers))
    parts = {
        "loss": (1.0, losses["loss"]),
        "loss_mtp": (weights.mtp, losses["loss_mtp"]),
        "loss_indexer": (weights.indexer * csa, losses["loss_indexer"]),
        "loss_balance": (weights.balance * len(e.learned_gate_names()), losses["loss_balance"]),
    }
    assert e.shares.total is not None
    expected = sum(weight * float(value) for weight, value in parts.values())
    total = float(e.shares.total)
    if not abs(total - expected) <= 5e-6 * abs(expected):
        shown = " + ".join(f"{w:g} * {name} {float(v):.6g}" for name, (w, v) in parts.items())
        yield f"the objective is {total:.7g}, but {shown} = {expected:.7g}"


def mtp(e: Evidence) -> Iterator[str]:
    """MTP has a loss where it was asked for, and does nothing where it was not."""
    depths = e.run.model.num_nextn_predict_layers
    ran = [name for name in e.seams.passes if name.startswith("mtp.")]
    if ran and not e.step.weights.mtp:
        yield f"{ran[0]} ran, but the MTP loss has the weight 0"
    if not (depths and e.step.weights.mtp > 0 and e.longest_document > 2):
        return
    if len(e.model.mtp) != depths and e.pipeline is None:
        yield f"model.num_nextn_predict_layers={depths}, but the model has {len(e.model.mtp)}"
    if not float(e.shares.losses["loss_mtp"]) > 0:
        loss = float(e.shares.losses["loss_mtp"])
        yield f"the MTP loss is {loss} with weight {e.step.weights.mtp}"


def indexer(e: Evidence) -> Iterator[str]:
    """The indexers have a loss where it was asked for."""
    loss = float(e.shares.losses["loss_indexer"])
    if e.step.weights.indexer > 0 and e.csa_layers() and not loss > 0:
        yield f"the indexer loss is {loss} with weight {e.step.weights.indexer}"


def balance(e: Evidence) -> Iterator[str]:
    """The balance loss is there where it was asked for; 1 at perfect balance, never 0."""
    loss = float(e.shares.losses["loss_balance"])
    if e.step.weights.balance > 0 and e.learned_gate_names() and not loss > 0:
        yield f"the balance loss is {loss} with weight {e.step.weights.balance}"


def bias(e: Evidence) -> Iterator[str]:
    """Every learned gate's bias moved by the speed asked for, against the load."""
    speed = e.step.weights.bias_update_speed if e.update.applied else 0.0
    for name, gate in e.learned_gates().items():
        load_E = e.shares.expert_load.get(name)
        if load_E is None:
            yield f"{name} reported no expert load"
            continue
        expected = e.biases[name]
        if speed:
            expected = expected + speed * torch.sign(load_E.mean() - load_E)
        if not torch.allclose(gate.bias, expected, rtol=0, atol=1e-3 * speed):
            moved = float((gate.bias - e.biases[name]).abs().max())
            yield f"{name}.bias moved by {moved:g}, train.bias_update_speed asks for {speed:g}"


BEFORE_UPDATE: dict[str, Check] = {
    "tracked": tracked,
    "early": early,
    "objective": objective,
    "mtp": mtp,
    "indexer": indexer,
    "balance": balance,
    "kernels": kernels,
    "precision": precision,
    "quant": quant,
    "recompute": recompute,
    "compiled": compiled,
    "pipeline": pipeline,
}
AFTER_UPDATE: dict[str, Check] = {
    "frozen": frozen,
    "owner": owner,
    "momentum": momentum,
    "algorithm": algorithm,
    "live": live,
    "bias": bias,
}
