"""Long-context probes while a run trains: losses of chosen tokens, under any layout.

The tokens that count are chosen by their labels, so the engine's own evaluation measures them, on
every layout that trains. The tasks are those of ``v4 probe``, which has the rest: right answers,
heat maps, attention, on the run's checkpoints.
"""

# Legend: B rows, T tokens, K prediction depths, N tokens of a document
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data.batch import IGNORE, Batch
from data.loader import Loader
from model.config import ModelConfig
from model.loss import Objective
from parallel.engine import Engine
from train.probes.measures import edges
from train.probes.tasks import needle
from train.record.metrics import Record
from train.step import StepPlan

_DOCUMENTS = 8  # held-out documents, and needles of a kind
_SEED = 0
_TAIL = 500  # last tokens of a document, a quarter of the row at most

Counted = tuple[np.ndarray, int, int]  # ids, and the first token that counts and the one behind


class Prober:
    """Measures every so many steps; otherwise gives nothing.

    Args:
        engine: runs the model.
        loader: has the held-out documents and the tokenizer.
        config: of the model.
        every: ``train.probe_every``; its rows have ``LEAST_TOKENS`` or more (preflight/reach.py).
    """

    def __init__(self, engine: Engine, loader: Loader, config: ModelConfig, every: int) -> None:
        self._engine, self._loader, self._config, self._every = engine, loader, config, every

    def measure(self, step: StepPlan) -> Record:
        """Nats per scored token by probe, at the step's row length; empty where none is due."""
        if not self._every or step.number % self._every:
            return {}
        found: Record = {}
        for name, scored in self._probes(step.stage.seq_len):
            if scored:
                found[f"probe_{name}"] = self._loss(step, scored)
        return found

    def _probes(self, T: int) -> Iterator[tuple[str, list[Counted]]]:
        documents = self._loader.validation_documents(_DOCUMENTS)
        begins = edges(T)
        for begin, end in zip(begins, [*begins[1:], T], strict=True):
            some = [d[:T] for d in documents if len(d) > max(begin, 1)]
            yield f"loss_{begin}", [(d, max(begin, 1), min(end, len(d))) for d in some]
        tail, window = min(_TAIL, T // 4), self._config.sliding_window
        long = [d[-T:] for d in documents if min(T, len(d)) > tail + window]
        yield "tail_whole", [(d, len(d) - tail, len(d)) for d in long]
        cut = [d[-(tail + window) :] for d in long]
        yield "tail_window", [(d, window, len(d)) for d in cut]
        for name, depth in (("far", 0.0), ("near", 1.0)):
            asked = [
                needle(self._loader.tokenizer, "single", T, depth, _SEED, n)
                for n in range(_DOCUMENTS)
            ]
            yield f"needle_{name}", [(q.ids_N, q.begin, len(q.ids_N)) for q in asked]

    def _loss(self, step: StepPlan, scored: list[Counted]) -> float:
        total = sum(stop - begin for _, begin, stop in scored)
        depths = 1 + self._config.num_nextn_predict_layers
        objective = Objective(
            targets_K=(float(total),) + (1.0,) * (depths - 1),
            tokens=float(sum(len(ids_N) for ids_N, _, _ in scored)),
            mtp_weight=0.0,
            indexer_weight=0.0,
            balance_weight=0.0,
            indexer_phase=step.stage.indexer_phase,
        )
        shares = self._engine.evaluate(self._rows(step.stage.seq_len, scored, depths), objective)
        return float(shares.losses["loss"])

    def _rows(self, T: int, scored: list[Counted], depths: int) -> Iterator[Batch]:
        """This data rank's rows, one a microbatch; each rank has as many."""
        rank, degree = self._engine.data_rank, self._engine.data_degree
        for number in range(-(-len(scored) // degree)):
            at = number * degree + rank
            ids_N, begin, stop = scored[at if at < len(scored) else 0]
            ids_BT = torch.zeros(1, T, dtype=torch.int64)
            ids_BT[0, : len(ids_N)] = torch.from_numpy(ids_N)
            documents_BT = torch.full((1, T), -1)
            documents_BT[0, : len(ids_N)] = 0
            labels_BTK = torch.full((1, T, depths), IGNORE)
            if at < len(scored):  # else ranks that share parameters only run in step
                labels_BTK[0, begin - 1 : stop - 1, 0] = ids_BT[0, begin:stop]
            yield Batch(ids_BT, documents_BT, labels_BTK)
