"""AdamW with decoupled weight decay, for what Muon does not own (DeepSeek-V4 section 4.2.2).

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The arithmetic is torch's fused kernel; the state is ours, keyed by name and there from step 0.
Elementwise, so a sharded parameter (DTensor) is moved through its local shard and its state is
sharded like it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from optim.config import AdamWConfig


@dataclass(frozen=True)
class AdamWEntry:
    """A parameter that AdamW owns.

    Attributes:
        name: fully qualified.
        parameter: whole, or a DTensor.
        weight_decay: coefficient.
    """

    name: str
    parameter: Tensor
    weight_decay: float


class AdamW:
    """AdamW over a list of parameters.

    Attributes:
        state: name -> {"exp_avg", "exp_avg_sq": shaped like the parameter, "step": fp32 scalar,
            steps it moved}.
    """

    algorithm = "adamw"

    def __init__(
        self, entries: Sequence[AdamWEntry], config: AdamWConfig, state_dtype: torch.dtype
    ) -> None:
        self.config = config
        self.entries = {entry.name: entry for entry in entries}
        self.state = {entry.name: _zero_state(entry.parameter, state_dtype) for entry in entries}

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
        for name in moved:
            entry = self.entries[name]
            groups.setdefault((entry.parameter.device, entry.weight_decay), []).append(name)
        for (device, weight_decay), group in groups.items():
            self._step_group(group, lr, weight_decay, device)
        return moved

    def _step_group(
        self, names: list[str], lr: float, weight_decay: float, device: torch.device
    ) -> None:
        parameters = [self.entries[name].parameter for name in names]
        stored = {
            key: [_local(self.state[name][key]) for name in names]
            for key in ("exp_avg", "exp_avg_sq")
        }
        # The kernel wants moments in the dtype of the weight; fp32 storage passes through uncopied.
        moments = {
            key: [s.to(p.dtype) for s, p in zip(tensors, parameters, strict=True)]
            for key, tensors in stored.items()
        }
        adamw(
            [_local(p.detach()) for p in parameters],
            [
                _local(p.grad) if p.grad is not None else torch.zeros_like(_local(p))
                for p in parameters
            ],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            [],
            [self.state[name]["step"] for name in names],
            fused=device.type in ("cpu", "cuda"),
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


def _zero_state(parameter: Tensor, state_dtype: torch.dtype) -> dict[str, Tensor]:
    parameter = parameter.detach()
    return {
        "exp_avg": torch.zeros_like(parameter, dtype=state_dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=state_dtype),
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
    }


def _local(tensor: Tensor) -> Tensor:
    to_local = getattr(tensor, "to_local", None)  # DTensor; plain tensors have none
    return to_local() if to_local else tensor
