"""Composition: parameters and a config in, one :class:`Optimizer` out.

The table of ``optim/groups.py`` says who owns what; an engine per owner does the arithmetic. To
add an optimizer, write its file and add a line to :data:`ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from optim.adamw import AdamW
from optim.config import OptimConfig, StateDtype
from optim.errors import ConfigError
from optim.groups import Owner, ParamRecord, build_table
from optim.muon import Muon, MuonEntry
from optim.muon_distributed import ShardedMuon
from optim.newton_schulz import SymmetricProduct, whole_product
from optim.offload import Offload
from optim.owned import OwnedParameter

State = dict[str, dict[str, Tensor]]


class GroupOptimizer(Protocol):
    """One algorithm over the parameters that it owns."""

    state: State
    algorithm: str  # "muon", "adamw": what moved a parameter

    def step(self, lr: float, names: Iterable[str]) -> list[str]:
        """Move the named parameters and return their names."""
        ...


class Optimizer:
    """All parameters of a model, each moved by exactly one algorithm.

    Attributes:
        table: one record a parameter (params.csv).
        moved: parameter -> algorithm that ran on it in the last step; what the audit compares with
            the table.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        table: list[ParamRecord],
        engines: Mapping[Owner, GroupOptimizer],
        trainable: Callable[[str], bool] | None = None,
    ) -> None:
        self.table = table
        self.moved: dict[str, str] = {}
        self._parameters = dict(parameters)
        self._engines = dict(engines)
        self._owner = {record.name: record.owner for record in table}
        self.set_trainable(trainable)

    def set_trainable(self, trainable: Callable[[str], bool] | None) -> None:
        """Start a phase: only parameters for which this holds move (None: all). State stays."""
        self._active = [n for n in self._parameters if trainable is None or trainable(n)]

    def trainable_parameters(self) -> dict[str, Parameter]:
        """What the current phase moves, in table order; the set whose gradient norm is clipped."""
        return {name: self._parameters[name] for name in self._active}

    def step(self, lr: float) -> None:
        """Move every trainable parameter; a missing gradient counts as zero.

        Args:
            lr: learning rate of this step, from :func:`optim.schedule.learning_rate`.

        Raises:
            ValueError: a parameter of this phase does not require a gradient, so it could only
                decay.
        """
        for name in self._active:
            if not self._parameters[name].requires_grad:
                raise ValueError(
                    f"optim: {name} is trained in this phase but has requires_grad=False"
                )
        self.moved = {}
        for owner, engine in self._engines.items():
            names = [name for name in self._active if self._owner[name] is owner]
            self.moved.update(dict.fromkeys(engine.step(lr, names), engine.algorithm))

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters, frozen ones too."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_dict(self) -> State:
        """Parameter -> its state tensors (not copies), complete from step 0, free of any layout."""
        state: State = {}
        for engine in self._engines.values():
            state.update(engine.state)
        return {name: dict(state[name]) for name in self._parameters}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy a saved state in.

        Raises:
            ValueError: parameters, state names or shapes differ; nothing was copied then.
        """
        own = self.state_dict()
        _need_equal("parameters", state.keys(), own.keys())
        for name, tensors in own.items():
            _need_equal(f"state of {name}", state[name].keys(), tensors.keys())
            for key, tensor in tensors.items():
                saved = tuple(state[name][key].shape)
                if saved != tuple(tensor.shape):
                    raise ConfigError(
                        f"optimizer state: {name}.{key} was saved with shape {saved}, now it is"
                        f" {tuple(tensor.shape)}"
                    )
        for name, tensors in own.items():
            for key, tensor in tensors.items():
                tensor.copy_(state[name][key])


def _need_equal(what: str, saved: Iterable[str], own: Iterable[str]) -> None:
    saved, own = set(saved), set(own)
    if saved != own:
        raise ConfigError(
            f"optimizer state: {what} differ: only saved {sorted(saved - own)},"
            f" only here {sorted(own - saved)}"
        )


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    config: OptimConfig,
    trainable: Callable[[str], bool] | None = None,
    split_counts: Mapping[str, int] | None = None,
    group: ProcessGroup | None = None,
    shapes: Mapping[str, Iterable[int]] | None = None,
    offload: Offload | None = None,
    product: SymmetricProduct = whole_product,
) -> Optimizer:
    """Build the optimizer of a model.

    Args:
        named_parameters: fully qualified name and parameter, each once.
        config: the ``optim`` section.
        trainable: parameters of the first phase; ``None`` = all.
        split_counts: sizes of the model by which a Muon split may cut rows, ``{"o_groups": ...}``
            at least.
        group: ranks that hold shards of the parameters, which are DTensors then; None: they are
            whole.
        shapes: name and whole shape of all parameters of the model, against which patterns of the
            config are held; None: the given ones are all.
        offload: what rests in host memory; None: nothing.
        product: forms the symmetric products of Newton-Schulz.

    Raises:
        ValueError: see :meth:`OptimConfig.validate` and :func:`optim.groups.build_table`.
    """
    config.validate()
    parameters = dict(named_parameters)
    here = {name: parameter.shape for name, parameter in parameters.items()}
    whole = build_table({**(shapes or {}), **here}, config, split_counts)
    records = {record.name: record for record in whole}
    table = [records[name] for name in here]
    if missing := sorted({record.owner for record in table} - ENGINES.keys()):
        raise ConfigError(
            f"optim.name={config.name}: optim/build.py has no engine of {missing[0]} in ENGINES"
        )
    engines = {
        owner: build(parameters, table, config, group, offload, product)
        for owner, build in ENGINES.items()
    }
    return Optimizer(parameters, table, engines, trainable)


def _build_muon(
    parameters: Mapping[str, Parameter],
    table: list[ParamRecord],
    config: OptimConfig,
    group: ProcessGroup | None,
    offload: Offload | None,
    product: SymmetricProduct,
) -> GroupOptimizer:
    transfers, masters = (offload.transfers, offload.masters) if offload else (None, {})
    entries = [
        MuonEntry(
            r.name,
            parameters[r.name],
            r.weight_decay,
            masters.get(r.name),
            num_matrices=r.num_matrices,
        )
        for r in table
        if r.owner is Owner.muon
    ]
    for entry in entries:
        if isinstance(entry.parameter, DTensor) != (group is not None):
            raise ValueError(
                f"optim.name=muon: {entry.name} is"
                f" {'whole' if group else 'sharded'}, but the optimizer was built for"
                f" {'shards' if group else 'one process'}"
            )
    state_dtype = _STATE_DTYPES[config.state_dtype]
    if group is not None:
        return ShardedMuon(entries, config.muon, state_dtype, group, transfers, product)
    return Muon(entries, config.muon, state_dtype, transfers, product)


def _build_adamw(
    parameters: Mapping[str, Parameter],
    table: list[ParamRecord],
    config: OptimConfig,
    _: ProcessGroup | None,
    offload: Offload | None,
    _product: SymmetricProduct,
) -> GroupOptimizer:
    transfers, masters = (offload.transfers, offload.masters) if offload else (None, {})
    entries = [
        OwnedParameter(r.name, parameters[r.name], r.weight_decay, masters.get(r.name))
        for r in table
        if r.owner is Owner.adamw
    ]
    return AdamW(entries, config.adamw, _STATE_DTYPES[config.state_dtype], transfers)


_STATE_DTYPES = {StateDtype.fp32: torch.float32, StateDtype.bf16: torch.bfloat16}
ENGINES = {
    Owner.muon: _build_muon,
    Owner.adamw: _build_adamw,
}
