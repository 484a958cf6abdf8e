"""AdamW with decoupled weight decay, for what Muon does not own (DeepSeek-V4 section 4.2.2).

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The arithmetic is torch's fused kernel; the state is ours, keyed by name and there from step 0.
Elementwise, so a sharded parameter (DTensor) is moved through its local shard and its state is
sharded like it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from optim.config import AdamWConfig
from optim.offload import HOST, Arrival, Transfers, resting_zeros
from optim.owned import OwnedParameter


class AdamW:
    """AdamW over a list of parameters.

    Args:
        entries: its parameters.
        config: the ``optim.adamw`` section.
        state_dtype: of the moments.
        transfers: moments rest in host memory, and weights are moved there; None: on the device.

    Attributes:
        state: name -> {"exp_avg", "exp_avg_sq": shaped like the parameter, "step": fp32 scalar,
            steps it moved}.
    """

    algorithm = "adamw"

    def __init__(
        self,
        entries: Sequence[OwnedParameter],
        config: AdamWConfig,
        state_dtype: torch.dtype,
        transfers: Transfers | None = None,
    ) -> None:
        self.config, self.transfers = config, transfers
        self.entries = {entry.name: entry for entry in entries}
        self.state = {
            entry.name: _zero_state(entry.parameter, state_dtype, transfers) for entry in entries
        }

    @torch.no_grad()
    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Move the named parameters; a missing gradient counts as zero.

        Args:
            lr: learning rate of this step.
            names: parameters of the current phase; the others and their moments are not touched.

        Returns:
            The names moved.
        """
        groups: dict[tuple[torch.device, float], list[str]] = {}
        moved = list(names)
        if self.transfers is not None:
            self._step_on_host(moved, lr, self.transfers)
            return moved
        for name in moved:
            entry = self.entries[name]
            groups.setdefault((entry.parameter.device, entry.weight_decay), []).append(name)
        for (_, weight_decay), group in groups.items():
            parameters = [self.entries[name].parameter for name in group]
            weights = [_local(p.detach()) for p in parameters]
            grads = [
                torch.zeros_like(w) if p.grad is None else _local(p.grad)
                for w, p in zip(weights, parameters, strict=True)
            ]
            self._move(group, weights, grads, lr, weight_decay)
        return moved

    def _step_on_host(self, names: list[str], lr: float, transfers: Transfers) -> None:
        """Gradient down, weight up, one parameter after the other; the next one is on its way."""

        def begin(name: str) -> Arrival:
            entry = self.entries[name]
            live, grad = _local(entry.parameter.detach()), entry.parameter.grad
            grad = torch.zeros_like(live, dtype=torch.float32) if grad is None else _local(grad)
            return transfers.take_down([grad, live] if entry.master is None else [grad])

        arriving = begin(names[0]) if names else None
        for number, name in enumerate(names):
            assert arriving is not None
            grad, *weight = arriving.on_host()
            arriving = begin(names[number + 1]) if number + 1 < len(names) else None
            entry = self.entries[name]
            master = weight[0] if entry.master is None else entry.master
            self._move([name], [master], [grad], lr, entry.weight_decay)
            live = _local(entry.parameter.detach())
            transfers.send([master.to(live.dtype)], [live])
        transfers.finish()

    def _move(
        self,
        names: list[str],
        weights: list[Tensor],
        grads: list[Tensor],
        lr: float,
        weight_decay: float,
    ) -> None:
        """Move fp32 weights; they, their gradients and moments are on one device."""
        stored = {
            key: [_local(self.state[name][key]) for name in names]
            for key in ("exp_avg", "exp_avg_sq")
        }
        # The kernel wants moments in the dtype of the weight; fp32 storage passes through uncopied.
        moments = {
            key: [s.to(w.dtype) for s, w in zip(tensors, weights, strict=True)]
            for key, tensors in stored.items()
        }
        adamw(
            weights,
            grads,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            [self.state[name]["step"] for name in names],
            fused=weights[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.config.eps,
            maximize=False,
        )
        for key, tensors in stored.items():
            for target, moment in zip(tensors, moments[key], strict=True):
                if target is not moment:
                    target.copy_(moment)


def _zero_state(
    parameter: Tensor, state_dtype: torch.dtype, transfers: Transfers | None
) -> dict[str, Tensor]:
    device = parameter.device if transfers is None else HOST
    return {
        "exp_avg": resting_zeros(parameter, state_dtype, transfers),
        "exp_avg_sq": resting_zeros(parameter, state_dtype, transfers),
        "step": torch.zeros((), dtype=torch.float32, device=device),
    }


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)  # DTensor; plain tensors have none
    return to_local() if to_local else tensor
