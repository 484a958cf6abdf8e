"""Every block as one graph of ``torch.compile`` (``train.compile``).

Blocks are compiled one by one: each is small, and those of a kind look alike to the compiler's own
cache. A block is one whole graph or an error: a break, or more variants than ``_VARIANTS``, raises
and nothing falls back. What is compiled are passes that make gradients; evaluations, samples and
probes run the operations one by one, as does whoever asks by :meth:`CompiledBlocks.eager`.

Under FSDP a block becomes a graph in front of its sharding: the graph meets gathered weights, and
hooks that gather and reduce stay around it (``parallel/fsdp.py``).

A block that recomputes runs the same graph again, since autograd wants the same tensors kept by
both passes. The graph is given the same bits, so it chooses the same experts and entries; that is
asserted on the device.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.context import ForwardContext

BACKEND = "inductor"
_VARIANTS = 32  # of a block: numbers of rows and entries, phases, monitors


class CompiledBlocks:
    """The compiled blocks of a model.

    Args:
        backend: of the compiler.

    Attributes:
        names: the blocks, in order.
        calls: block -> how often its graph was called, recomputation included.
        graphs: built so far.
    """

    def __init__(self, backend: str = BACKEND) -> None:
        self.names: list[str] = []
        self.calls: Counter[str] = Counter()
        self.graphs = 0
        self._backend, self._eager = backend, False

    def install(self, model: nn.Module, recompute: bool) -> None:
        """Let every block of ``model`` run as a graph.

        Args:
            model: holds :class:`model.block.Block` modules.
            recompute: blocks keep their input alone (``train.activation_checkpoint=block``).
        """
        # All blocks share the code of one forward, and its graphs live as long as the process:
        # those of a sweep's run before count against the same limit.
        torch._dynamo.reset()
        blocks = sum(isinstance(module, Block) for module in model.modules())
        limits = torch._dynamo.config
        limits.accumulated_recompile_limit = max(
            limits.accumulated_recompile_limit, _VARIANTS * blocks
        )
        # The compiler asks every tensor for it.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        for name, block in model.named_modules():
            if not isinstance(block, Block):
                continue
            graph = torch.compile(  # pyright: ignore[reportCallIssue]  overloads lack the last two
                block.forward,
                fullgraph=True,
                backend=self._build,
                recompile_limit=_VARIANTS,
                isolate_recompiles=True,
            )
            self.names.append(name)
            block.forward = partial(self._run, name, block.forward, graph)
            if recompute:
                block.forward = partial(_repeated, block.forward)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run the operations one by one inside."""
        self._eager = True
        try:
            yield
        finally:
            self._eager = False

    def told(self) -> dict[str, Any]:
        """What was compiled, for the receipt."""
        return {"blocks": len(self.names), "graphs": self.graphs, "backend": self._backend}

    def _run(
        self,
        name: str,
        forward: Callable[..., Any],
        graph: Callable[..., Any],
        x_BTSD: Tensor,
        input_ids_BT: Tensor,
        context: ForwardContext,
    ) -> Any:
        if self._eager or not torch.is_grad_enabled():
            return forward(x_BTSD, input_ids_BT, context)
        self.calls[name] += 1
        return graph(x_BTSD, input_ids_BT, context)

    def _build(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self._backend)(module, inputs)


def _repeated(
    forward: Callable[..., Any], x_BTSD: Tensor, input_ids_BT: Tensor, context: ForwardContext
) -> Any:
    """A block's forward that runs again in the backward pass, and must choose the same."""
    first: dict[str, Tensor] = {}

    def run(x_BTSD: Tensor) -> Any:
        chosen: dict[str, Tensor] = {}
        out = forward(x_BTSD, input_ids_BT, replace(context, record=chosen))
        if first:
            for name, index in chosen.items():
                torch._assert_async((index == first[name]).all(), f"{name} chose anew")
            return out
        first.update(chosen)
        if context.record is not None:
            context.record.update(chosen)
        return out

    # To the end: what compares comes after all that is kept.
    return checkpoint(run, x_BTSD, use_reentrant=False, early_stop=False)
