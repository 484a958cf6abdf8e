"""Whole tensors of a model that DeepSpeed keeps in pieces: read, set, and brought to the model.

With masters on NVMe a flat group lies on the drive between its uses, in files of DeepSpeed's
swapper. The release's own accessors read the group anew for every parameter, and those that set a
master drop the group's gradients that it had kept in memory; so a group is opened here, used for as
many parameters as ask for it one after the other, and written back once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from optim.groups import Owner
from parallel.zero_optimizer import MOMENTS, FlatAdamW


class Partitions:
    """Access to weights, masters, gradients and moments by name. Every method is collective.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        stage: 1, 2 or 3.
        parameters: by name.
        client: what it steps.
    """

    def __init__(
        self, zero: Any, stage: int, parameters: Mapping[str, Parameter], client: FlatAdamW
    ) -> None:
        import deepspeed  # noqa: PLC0415  an extra

        self._zero, self._stage, self._utils = zero, stage, deepspeed.utils
        self._gathered = deepspeed.zero.GatheredParameters
        self._parameters = dict(parameters)
        self.client = client
        self._drive = _Drive(zero) if stage == 3 and zero.swap_optimizer else None
        for number, (flat, group) in enumerate(self._flats()):
            if client.param_groups[group]["owner"] == Owner.adamw.value:
                if self._drive is not None and self._drive.holds(number):
                    self._drive.open(number, changes=True)
                client.moments(flat)
        self.close()
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> Iterator[tuple[Tensor, int]]:
        """Each flat fp32 shard that is this rank's, and the group it is of."""
        if self._stage < 3:
            yield from (
                (flat, i) for i, flat in enumerate(self._zero.single_partition_of_fp32_groups)
            )
        else:
            groups = self._zero.sub_group_to_group_id
            yield from (
                (f, groups[i]) for i, f in enumerate(self._zero.fp32_partitioned_groups_flat)
            )

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names so that a group on the drive is read once."""
        if self._drive is None:
            return list(names)
        places = {name: self._drive_place(name) for name in names}
        resting = [name for name, place in places.items() if place is None]
        groups = sorted({place for place in places.values() if place is not None})
        return resting + [name for group in groups for name in places if places[name] == group]

    def close(self) -> None:
        """Let go of what was read from the drive, written back where it was changed.

        Due before DeepSpeed touches it: before its passes, its step and its checkpoints.
        """
        if self._drive is not None:
            self._drive.close()

    def on_drive(self) -> int:
        """Elements of this rank's masters that lie on the drive."""
        return 0 if self._drive is None else self._drive.elements()

    def least_bytes(self) -> int:
        """Size of a flat group from which DeepSpeed takes it to the drive."""
        return self._zero.optimizer_swapper.min_aio_bytes

    def _drive_place(self, name: str) -> int | None:
        """The flat group of a parameter, if it lies on the drive."""
        if self._drive is None:
            return None
        return self._drive.group_of(self._parameters[name])

    def _piece(self, name: str, key: str | None, changes: bool) -> Tensor | None:
        """This rank's part of a master, moment or gradient of a group that lies on the drive."""
        if self._drive is None or self._drive_place(name) is None:
            return None
        return self._drive.piece(self._parameters[name], key, changes)

    def _read(self, name: str, key: str | None) -> Tensor | None:
        """A whole tensor of a group on the drive."""
        piece = self._piece(name, key, changes=False)
        if piece is None:
            return None
        return self._zero._fp32_state_allgather(self._parameters[name], piece)

    def _write(self, name: str, key: str | None, value: Tensor) -> bool:
        """Set this rank's part, if it lies on the drive."""
        piece = self._piece(name, key, changes=True)
        if piece is not None:
            piece.copy_(self._own(self._parameters[name], value))
        return piece is not None

    def gradient(self, name: str) -> Tensor:
        """The reduced gradient, as DeepSpeed has it; between the backward pass and its step."""
        gradient = self._read(name, "grad")
        if gradient is None:
            gradient = self._utils.safe_get_full_grad(self._parameters[name])
        assert gradient is not None, f"DeepSpeed holds no gradient of {name}"
        return gradient.detach()

    def set_gradient(self, name: str, value: Tensor) -> None:
        """Replace a reduced gradient."""
        parameter = self._parameters[name]
        if self._stage < 3:
            self._utils.safe_set_full_grad(parameter, value)
        elif not self._write(name, "grad", value):
            self._utils.safe_set_local_grad(parameter, self._own(parameter, value))

    def master(self, name: str) -> Tensor:
        """A copy of the fp32 master."""
        master = self._read(name, None)
        if master is None:
            master = self._utils.safe_get_full_fp32_param(self._parameters[name])
        return self._got(master, name)

    def set_master(self, name: str, value: Tensor) -> None:
        """Set the fp32 master; the model reads it after DeepSpeed's next step."""
        parameter = self._parameters[name]
        if self._stage < 3:
            self._utils.safe_set_full_fp32_param(parameter, value)
        elif not self._write(name, None, value):
            self._utils.safe_set_local_fp32_param(parameter, self._own(parameter, value))

    def moment(self, name: str, key: str) -> Tensor:
        """A copy of a moment of AdamW."""
        moment = self._read(name, key)
        if moment is None:
            moment = self._utils.safe_get_full_optimizer_state(self._parameters[name], key)
        return self._got(moment, name)

    def set_moment(self, name: str, key: str, value: Tensor) -> None:
        """Set a moment of AdamW."""
        parameter = self._parameters[name]
        if self._stage < 3:
            self._utils.safe_set_full_optimizer_state(parameter, value, key)
        elif not self._write(name, key, value):
            part = self._own(parameter, value)
            self._utils.safe_set_local_optimizer_state(parameter, part, key)

    @staticmethod
    def _own(parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a value: ZeRO 3's own setters fail where the ranks do not divide."""
        size, rank = parameter.partition_numel(), dist.get_rank()
        flat = value.reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
        return padded[rank * size : (rank + 1) * size]

    def live(self, name: str) -> Tensor:
        """The weight that the next forward pass reads."""
        parameter = self._parameters[name]
        if self._stage < 3:
            return parameter.detach()
        with self._gathered([parameter]):
            return parameter.detach().clone()

    def renew_live(self) -> None:
        """Let the model read the masters as they are now."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp16_groups)):
            if self._drive is not None and self._drive.holds(group):
                self._drive.open(group, changes=False)
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self.close()

    @staticmethod
    def _got(tensor: Tensor | None, name: str) -> Tensor:
        assert tensor is not None, f"DeepSpeed does not hold {name}"
        return tensor.detach()


class _Drive:
    """Flat groups whose masters, moments and gradients lie on NVMe; one is in memory at a time.

    DeepSpeed leaves groups of less than a block of its reader (1 MiB) in host memory.

    Args:
        zero: DeepSpeed's ZeRO 3 optimizer.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._open: int | None = None
        self._changed = False

    def holds(self, group: int) -> bool:
        return self._zero._swappable_optimizer_subgroup(group)

    def elements(self) -> int:
        sizes = self._zero.fp16_partitioned_groups_flat_numel
        return sum(int(size) for group, size in enumerate(sizes) if self.holds(group))

    def group_of(self, parameter: Parameter) -> int | None:
        group = self._zero.grad_position[self._zero.get_param_id(parameter)][0]
        return group if self.holds(group) else None

    def piece(self, parameter: Parameter, key: str | None, changes: bool) -> Tensor:
        """A view, good until the next group is opened; ``key`` None is the master."""
        group, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        self.open(group, changes)
        flat = self._zero.fp32_partitioned_groups_flat[group]
        if key is None:
            return flat.detach().narrow(0, start, size)
        if key == "grad":
            assert flat.grad is not None, "DeepSpeed holds no gradient"
            return flat.grad.narrow(0, start, size)
        assert key in MOMENTS
        return self._zero.optimizer.state[flat][key].narrow(0, start, size)

    def open(self, group: int, changes: bool) -> None:
        """Read a group, unless it is in memory."""
        if self._open != group:
            self.close()
            self._zero._optimizer_states_and_gradient_swap_in(group)
            self._open = group
        self._changed |= changes

    def close(self) -> None:
        """Write the group that is in memory, if it was changed."""
        if self._open is None:
            return
        group, changed = self._open, self._changed
        self._open, self._changed = None, False
        if changed:
            gradients = self._zero.fp32_partitioned_groups_flat[group].grad is not None
            self._zero._writeback_swap_state(group, write_opt_state=True, write_gradients=gradients)
        else:
            self._zero._release_swap_buffers(group)
