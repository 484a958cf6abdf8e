"""What one microbatch carries: ids, document ids and the labels of every prediction depth."""

# Legend: B rows, T tokens of a row, K prediction depths (1 + MTP depths)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

IGNORE = -1  # label of a position that predicts nothing


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, or a part of each (:meth:`part`).

    Attributes:
        input_ids_BT: int64 token ids; padding holds 0.
        document_ids_BT: int64, equal for the tokens of one document inside a row, -1 for padding. A
            document occupies one contiguous run of a row. Of whole rows, also in a part.
        labels_BTK: int64; ``[b, t, k]`` is the token ``1 + k`` places after position t of the same
            document (taken
            from the document itself, also where the row cuts it), or ``IGNORE`` where that lies
            beyond the document.
        routing: experts to use instead of the gates' own choices, int64 [B * T, experts per token]
            by name of the gate, of the part that computes it; None: every gate chooses.
    """

    input_ids_BT: Tensor
    document_ids_BT: Tensor
    labels_BTK: Tensor
    routing: Mapping[str, Tensor] | None = None

    def part(self, index: int, count: int) -> Batch:
        """The ``index``-th of ``count`` equal parts of every row; document ids stay whole."""
        size = self.input_ids_BT.shape[1] // count
        here = slice(index * size, (index + 1) * size)
        return replace(
            self, input_ids_BT=self.input_ids_BT[:, here], labels_BTK=self.labels_BTK[:, here]
        )

    def pinned(self) -> Batch:
        """The same with all that a device copies in pinned memory."""
        routing = self.routing and {name: t.pin_memory() for name, t in self.routing.items()}
        return Batch(
            self.input_ids_BT.pin_memory(),
            self.document_ids_BT,  # stays on the host
            self.labels_BTK.pin_memory(),
            routing,
        )


@dataclass(frozen=True)
class BatchCounts:
    """Normalisers of a whole global batch, known from the packing alone, before any forward pass.

    Attributes:
        tokens: non-padding tokens.
        targets_K: positions with a label, for every prediction depth.
        documents: document pieces.
    """

    tokens: int
    targets_K: tuple[int, ...]
    documents: int
