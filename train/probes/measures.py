"""What the probes measure with a reader: loss by position, tails, needles, copies, induction."""

# Legend: N tokens of a document
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from train.probes.question import Question
from train.probes.reader import Reader
from train.probes.tasks import copy, induction, needle, ordinary_ids

FIRST_EDGE, EDGE_FACTOR = 16, 4  # position buckets: 0, 16, 64, 256 ...


@dataclass(frozen=True)
class ProbeCell:
    """Questions of one form.

    Attributes:
        task: single, keys, values, pairs, gist, copy or induction.
        length: tokens of a document.
        depth: where the value was stated, as a fraction of the filler; None: there is but one way.
        distance: mean tokens between value and answer.
        beyond: whether every document's distance is above the windows' reach; None: the model's
            windows are not known.
        count: documents.
        correct: fraction of answers that are right to the last token; of copy and induction the
            fraction of tokens.
        chance: of a guess.
        nats: per token of the answer.
    """

    task: str
    length: int
    depth: float | None
    distance: float
    beyond: bool | None
    count: int
    correct: float
    chance: float
    nats: float


def edges(longest: int) -> list[int]:
    """Beginnings of the buckets of positions up to a length: 0, 16, 64, 256 ..."""
    found, edge = [0], FIRST_EDGE
    while edge < longest:
        found.append(edge)
        edge *= EDGE_FACTOR
    return found


def loss_by_position(
    reader: Reader, documents: Sequence[np.ndarray], longest: int
) -> list[dict[str, Any]]:
    """Mean loss of tokens by how many stand before them in their document.

    Args:
        reader: the model.
        documents: ids.
        longest: tokens of a document that are read.
    """
    begins = np.array(edges(longest))
    nats, tokens = np.zeros(len(begins)), np.zeros(len(begins), np.int64)
    for ids_N in (document[:longest] for document in documents if len(document) > 1):
        nll = reader.score(ids_N, 1).nll_P.double().numpy()
        bucket = np.searchsorted(begins, np.arange(1, len(ids_N)), side="right") - 1
        for place in range(len(begins)):
            nats[place] += nll[bucket == place].sum()
            tokens[place] += (bucket == place).sum()
    ends = [*begins[1:].tolist(), longest]
    return [
        {"from": int(begin), "to": int(end), "tokens": int(n), "loss": float(total / n)}
        for begin, end, n, total in zip(begins, ends, tokens, nats, strict=True)
        if n
    ]


def tail_losses(
    reader: Reader,
    documents: Sequence[np.ndarray],
    longest: int,
    contexts: dict[str, int],
    tail: int = 500,
) -> dict[str, Any]:
    """Loss of the last tokens of long documents, read whole and with what is before cut off.

    Args:
        reader: the model.
        documents: ids; those too short to lose anything by the longest cut are left out.
        longest: tokens of a document that are read whole, its last ones.
        contexts: name -> tokens before the scored ones that are kept.
        tail: tokens that are scored.
    """
    least = tail + max(contexts.values()) + 1
    chosen = [document[-longest:] for document in documents if len(document) > least]
    chosen = [ids_N for ids_N in chosen if len(ids_N) > least]
    if not chosen:
        return {"documents": 0, "needs_tokens": least + 1}
    found: dict[str, Any] = {
        "documents": len(chosen),
        "tail": tail,
        "tokens": sum(map(len, chosen)),
    }
    for name, context in {"whole": longest, **contexts}.items():
        cut = [ids_N[-min(len(ids_N), tail + context) :] for ids_N in chosen]
        losses = [float(reader.score(ids_N, len(ids_N) - tail).nll_P.mean()) for ids_N in cut]
        found[name] = sum(losses) / len(losses)
    return found


def needles(
    reader: Reader,
    tokenizer: Tokenizer,
    kinds: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int,
    reach: int | None,
    tell: Callable[[], object] = lambda: None,
) -> list[ProbeCell]:
    """Needles of some kinds by length and depth."""
    cells = []
    for kind in kinds:
        for length in lengths:
            for depth in depths:
                asked = [needle(tokenizer, kind, length, depth, seed, n) for n in range(count)]
                cells.append(_ask(reader, kind, asked, length, depth, reach, whole=True))
                tell()
    return cells


def repeats(
    reader: Reader,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    count: int,
    seed: int,
    reach: int | None,
) -> list[ProbeCell]:
    """Copies of a passage and of random tokens (induction) over distances."""
    vocabulary, cells = ordinary_ids(tokenizer), []
    for length in lengths:
        copies = [copy(tokenizer, length, seed, n) for n in range(count)]
        cells.append(_ask(reader, "copy", copies, length, None, reach, whole=False))
        twice = [induction(vocabulary, length // 2, seed, n) for n in range(count)]
        cells.append(_ask(reader, "induction", twice, length, None, reach, whole=False))
    return cells


def retrieval(cells: Sequence[ProbeCell]) -> dict[str, dict[str, Any]]:
    """By task, right answers within the windows' reach and beyond it, with chance there."""
    found: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        for name, flag in (("within_reach", False), ("beyond_reach", True), ("all", None)):
            some = [c for c in cells if c.task == task and (flag is None or c.beyond is flag)]
            if some:
                found.setdefault(task, {})[name] = {
                    "correct": sum(c.correct for c in some) / len(some),
                    "chance": sum(c.chance for c in some) / len(some),
                    "nats": sum(c.nats for c in some) / len(some),
                    "documents": sum(c.count for c in some),
                }
    return found


def as_rows(cells: Sequence[ProbeCell]) -> list[dict[str, Any]]:
    """JSON values."""
    return [asdict(cell) for cell in cells]


def _ask(
    reader: Reader, task: str, asked: Sequence[Question], length: int, depth: float | None,
    reach: int | None, whole: bool,
) -> ProbeCell:  # fmt: skip
    correct = nats = 0.0
    for q in asked:
        scored = reader.score(q.ids_N, q.begin)
        hit = scored.hit_P.all() if whole else scored.hit_P.float().mean()
        correct += float(hit)
        nats += float(scored.nll_P.mean())
    n = len(asked)
    beyond = None if reach is None else min(q.distance for q in asked) > reach
    distance = sum(q.distance for q in asked) / n
    chance = sum(q.chance for q in asked) / n
    return ProbeCell(task, length, depth, distance, beyond, n, correct / n, chance, nats / n)
