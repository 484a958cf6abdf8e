"""Recompute blocks in the backward pass instead of keeping what they computed.

``block`` keeps a block's input, ``selective`` also the results of its matmuls. Both keep what was
chosen (experts and entries), so that the recomputation routes exactly as the first pass: ``block``
replays the choices by name, ``selective`` watches every operation and gives the kept ones back.

torch's own selective contexts demand that the recomputation runs the same operations; under FSDP it
does not, since parameters that the backward pass has gathered are not gathered again. These look
only at the operations that are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.context import ForwardContext

Keep = Callable[[Tensor], Callable[[], Tensor]]
_CHOICES = (torch.ops.aten.sort.stable, torch.ops.aten.topk.default, torch.ops.aten.argsort.stable)
_MATMULS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
)
_KEPT = frozenset(_CHOICES + _MATMULS)


def checkpoint_blocks(model: nn.Module, mode: str, keep: Keep | None = None) -> int:
    """Let every block of ``model`` recompute.

    Args:
        model: holds :class:`model.block.Block` modules.
        mode: ``none``, ``block`` or ``selective``.
        keep: puts away what ``selective`` keeps, and gives it back; None: it stays where it is.

    Returns:
        Number of blocks that recompute.
    """
    if mode == "none":
        return 0
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        forward = block.forward
        if mode == "block":
            block.forward = partial(_replaying, forward)
        else:
            block.forward = partial(
                checkpoint,
                forward,
                use_reentrant=False,
                context_fn=partial(_contexts, _KEPT, keep or Frozen),
            )
    return len(blocks)


def _replaying(
    forward: Callable[..., Any], x_BTSD: Tensor, input_ids_BT: Tensor, context: ForwardContext
) -> Any:
    """A block's forward whose recomputation takes the first pass' choices for its own."""
    chosen: dict[str, Tensor] = {}

    def run(x_BTSD: Tensor) -> Any:
        if chosen:
            again = replace(context, replay={**context.replay, **chosen}, record=None)
            return forward(x_BTSD, input_ids_BT, again)
        out = forward(x_BTSD, input_ids_BT, replace(context, record=chosen))
        if context.record is not None:
            context.record.update(chosen)
        return out

    return checkpoint(run, x_BTSD, use_reentrant=False)


def _contexts(
    kept: frozenset[Any], keep: Keep
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the first pass and for its recomputation."""
    results: dict[Any, list[Any]] = defaultdict(list)
    return _Keep(kept, results, keep), _Reuse(kept, results)


class _Kept(TorchDispatchMode):
    """Sees the operations whose results are kept, in the order of the calls of each."""

    def __init__(self, kept: frozenset[Any], results: dict[Any, list[Any]]) -> None:
        super().__init__()
        self._kept, self._results = kept, results


class _Keep(_Kept):
    """Keeps their results."""

    def __init__(self, kept: frozenset[Any], results: dict[Any, list[Any]], keep: Keep) -> None:
        super().__init__(kept, results)
        self._keep = keep

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._kept:
            self._results[func].append(tree_map_only(Tensor, self._keep, out))
        return out


class _Reuse(_Kept):
    """Gives them back; each is freed when it was used."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in self._kept:
            return func(*args, **(kwargs or {}))
        return tree_map(lambda kept: kept(), self._results[func].pop(0))


class Frozen:
    """A result, and how often it had been written to when it was kept.

    A call gives it again, unchanged since.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = self._tensor._version

    def __call__(self) -> Tensor:  # noqa: D102  said above
        if self._tensor._version != self._version:
            raise RuntimeError("a result that is kept for the backward pass was written to")
        return self._tensor
