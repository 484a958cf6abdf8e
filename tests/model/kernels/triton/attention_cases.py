"""Packed rows for the tests of attention and the indexer in Triton, and kernels with a fault."""

# Legend: B rows, T tokens, E entries, N chosen entries
import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.attention import EntrySet
from model.sequence_plan import build_sequence_plan

MODES = ("none", "range", "list", "bits")
ATOMIC = "atomic"  # a list whose pairs are added in no order


class Rows(NamedTuple):
    """Documents in rows, their entries, and a choice among the visible ones in no order."""

    start_BT: Tensor
    first_BT: Tensor
    stop_BT: Tensor
    index_BTN: Tensor
    entries: int

    def entry_set(self, kv_BEK, mode):
        if mode == "none":
            return None
        index = None if mode == "range" else self.index_BTN
        return EntrySet(kv_BEK, self.first_BT, self.stop_BT, index)


def packed(*documents, ratio=4, chosen=2, batch=1):
    """Rows of documents of these lengths; a negative length is padding. Row b is rolled by b.

    Args:
        documents: lengths.
        ratio: tokens an entry.
        chosen: N; -1 stands at random places where fewer are visible.
        batch: rows.
    """
    ids = [d if n > 0 else -1 for d, n in enumerate(documents) for _ in range(abs(n))]
    ids_BT = torch.stack([torch.tensor(ids).roll(b) for b in range(batch)])
    plan = build_sequence_plan(ids_BT, (ratio,))
    compressed = plan.compressed[ratio]
    first_BT, stop_BT = compressed.first_BT, compressed.stop_BT
    index_BTN = torch.full((*ids_BT.shape, chosen), -1)
    for b in range(batch):
        for t in range(ids_BT.shape[1]):
            visible = torch.arange(int(first_BT[b, t]), int(stop_BT[b, t]))
            visible = visible[torch.randperm(len(visible))[:chosen]]
            index_BTN[b, t, torch.randperm(chosen)[: len(visible)]] = visible
    return Rows(plan.start_BT, first_BT, stop_BT, index_BTN, compressed.num_entries)


def mutant(module, old, new, folder):
    """A module of kernels with ``old`` in its source replaced once.

    Args:
        module: to take the source from.
        old: text that stands in it.
        new: what replaces it.
        folder: to write to.
    """
    source = Path(module.__file__).read_text()
    assert old in source, old
    path = folder / "mutant_kernels.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("mutant_kernels", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
