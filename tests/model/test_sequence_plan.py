"""SequencePlan against loops over documents and tokens; all integers, so equality is exact."""

import pytest
import torch

from model.sequence_plan import build_sequence_plan

ROWS = [
    [(0, 13), (1, 8), (2, 3), (-1, 6)],
    [(5, 30)],
    [(-1, 30)],
    [(7, 1), (8, 1), (9, 4), (3, 4), (1, 20)],
    [(4, 16), (-1, 2), (6, 12)],
]


def document_ids(rows=ROWS):
    return torch.tensor([[d for d, n in row for _ in range(n)] for row in rows])


def naive(row_ids, ratio):
    """Entries (token lists), per-token (start, position, first, stop) by walking the row."""
    entries, per_token, start, first = [], [], 0, 0
    for t, d in enumerate(row_ids):
        if t == 0 or d != row_ids[t - 1]:
            start, first = t, len(entries)
        position = t - start
        if d >= 0 and (position + 1) % ratio == 0:
            entries.append(list(range(t - ratio + 1, t + 1)))
        stop = first + (position + 1) // ratio
        per_token.append((start, position, first, stop) if d >= 0 else None)
    return entries, per_token


@pytest.mark.core
@pytest.mark.parametrize("ratio", [1, 3, 4, 16, 64])
def test_plan_matches_walk_over_tokens(ratio):
    ids = document_ids()
    plan = build_sequence_plan(ids, (ratio,))
    entry_plan = plan.compressed[ratio]
    for b, row in enumerate(ids.tolist()):
        entries, per_token = naive(row, ratio)
        assert entry_plan.valid_BL[b].sum() == len(entries)
        for e, tokens in enumerate(entries):
            assert entry_plan.disjoint.tokens_BLM[b, e].tolist() == tokens
            position = per_token[tokens[0]][1]
            assert entry_plan.position_BL[b, e] == position
            assert bool(entry_plan.has_previous_BL[b, e]) == (position > 0)
            for j, t in enumerate(tokens):
                assert entry_plan.disjoint.slot_BU[b, t] == e * ratio + j
        fed = {t for tokens in entries for t in tokens}
        none = entry_plan.num_entries * ratio
        for t, expected in enumerate(per_token):
            if t not in fed:
                assert entry_plan.disjoint.slot_BU[b, t] == none
            if expected is None:
                assert not plan.valid_BT[b, t]
                assert entry_plan.first_BT[b, t] == entry_plan.stop_BT[b, t]
                assert plan.start_BT[b, t] > t  # sees nothing
                continue
            start, position, first, stop = expected
            assert (plan.start_BT[b, t], plan.position_BT[b, t]) == (start, position)
            seen = range(int(entry_plan.first_BT[b, t]), int(entry_plan.stop_BT[b, t]))
            assert list(seen) == list(range(first, max(first, stop)))


def test_plan_numbers_documents_and_lengths():
    ids = document_ids()
    plan = build_sequence_plan(ids, ())
    runs = [n for row in ROWS for _, n in row]
    assert plan.num_documents == len(runs)
    expected = torch.tensor([run for run, n in enumerate(runs) for _ in range(n)])
    assert torch.equal(plan.document_BT.flatten(), expected)
    assert torch.equal(plan.length_BT.flatten(), torch.tensor(runs)[expected])


def test_visible_entries_end_before_query():
    ids = document_ids()
    plan = build_sequence_plan(ids, (4,)).compressed[4]
    for b, t in torch.cartesian_prod(torch.arange(len(ROWS)), torch.arange(ids.shape[1])).tolist():
        for e in range(int(plan.first_BT[b, t]), int(plan.stop_BT[b, t])):
            tokens = plan.disjoint.tokens_BLM[b, e]
            assert int(tokens.max()) <= t
            assert (ids[b, tokens] == ids[b, t]).all()
