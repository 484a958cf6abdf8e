"""The indexer's choice and loss in Triton against float64, in the interpreter.

Bounds are those of ``checks.py``, twice the plain path's own error: gradients are differences of
probabilities, which cancel in both.
"""

import math
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels.attention import attention_reference
from model.kernels.indexer import index_topk_reference, indexer_loss_reference
from model.kernels.triton import attention, entries, indexer, indexer_kernels
from model.kernels.triton.launch import INTERPRETER, OPS, Tile, counted
from tests.helpers import relative
from tests.model.kernels.op_cases import indexer_loss as nonfinite_case
from tests.model.kernels.op_cases import reference, run
from tests.model.kernels.test_nonfinite import compare, planted
from tests.model.kernels.triton.attention_cases import ATOMIC, mutant, packed
from tests.model.kernels.triton.checks import (
    check,
    distance,
    doubled,
    gradients,
    in_float64,
    poisoned,
    shuffled,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def indexer_inputs(rows, J, L, dtype=torch.float32, size=1.0):
    B, T = rows.start_BT.shape
    q, k = torch.randn(B, T, J, L) * size, torch.randn(B, rows.entries, L) * size
    return [q.to(dtype), k.to(dtype), torch.randn(B, T, J)]


def attention_of(rows, mode, heads=2, K=16):
    """q, lse, entries of a plain attention: the teacher."""
    B, T = rows.start_BT.shape
    q, kv = torch.randn(B, T, heads, K), torch.randn(B, T, K)
    used = rows.entry_set(torch.randn(B, rows.entries, K), mode)
    lse = attention_reference(q, kv, torch.randn(heads), rows.start_BT, 5, used).lse_BTH
    return q, lse, used


def losses(rows, mode, with_mass=False):
    """The loss of ``indexer_inputs``, in Triton and plain."""
    q, lse, used = attention_of(rows, mode)
    mass = attention.mass_of(q, lse, used) if with_mass else None

    def ours(*inputs):
        return indexer.indexer_loss(inputs, q, lse, used, mass, deterministic=mode != ATOMIC)

    def plain(*inputs):
        dtype = inputs[2].dtype  # float64 in the oracle
        table = types.SimpleNamespace(**{**vars(used), "kv_BEK": used.kv_BEK.to(dtype)})
        return indexer_loss_reference(inputs, q.to(dtype), lse.to(dtype), table)

    return ours, plain


def hold(rows, mode, inputs, with_mass=False):
    ours, plain = losses(rows, mode, with_mass)
    check(ours, plain, inputs, [torch.tensor(0.7)], ordered=mode != ATOMIC)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("range", torch.float32), ("range", torch.float16), ("list", torch.float32),
     ("list", torch.float16), (ATOMIC, torch.float32), (ATOMIC, torch.float16)],
)  # fmt: skip
def test_loss_is_the_reference(mode, dtype):
    rows = packed(4, 3, -1, ratio=2)
    hold(rows, mode, indexer_inputs(rows, 3, 16, dtype), with_mass=True)


@pytest.mark.parametrize(
    ("mode", "documents", "J", "L", "size", "more"),
    [
        ("range", (1,), 1, 32, 1.0, {}),
        ("list", (1,), 1, 32, 1.0, {}),
        ("range", (3, 2), 16, 64, 3.0, {"batch": 2, "ratio": 1}),
        ("list", (3,), 64, 128, 1.0, {"ratio": 1, "chosen": 5}),
        ("list", (2,), 128, 16, 1.0, {"ratio": 1}),
        ("list", (3, 2), 16, 20, 1e-3, {"batch": 2, "ratio": 1}),
        (ATOMIC, (1,), 1, 32, 1.0, {}),
        (ATOMIC, (3,), 64, 128, 3.0, {"ratio": 1, "chosen": 5}),
        (ATOMIC, (2,), 128, 16, 1.0, {"ratio": 1}),
        (ATOMIC, (3, 2), 16, 20, 1e-3, {"batch": 2, "ratio": 1}),
    ],
)
def test_loss_of_shapes(mode, documents, J, L, size, more):
    """One token, no entries, a head dim that is no power of two, N above E; small and large."""
    rows = packed(*documents, **more)
    hold(rows, mode, indexer_inputs(rows, J, L, size=size))


@pytest.mark.parametrize("mode", ["range", "list", ATOMIC])
def test_bf16_beside_fp32_weights_keeps_its_dtypes(mode):
    """The logic alone: the interpreter's bf16 gives no tolerance."""
    rows = packed(4, 3, ratio=2)
    inputs, grads = indexer_inputs(rows, 3, 16, torch.bfloat16), [torch.tensor(0.7)]
    ours, plain = losses(rows, mode)
    (loss,), found = gradients(ours, inputs, grads)
    (want,), wanted = gradients(plain, [x.float() for x in inputs], grads)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b in zip((loss, *found), (want, *wanted), strict=True):
        assert relative(a, b) < 0.1


@pytest.mark.parametrize("mode", ["range", "list", ATOMIC])
def test_splits_and_chunks_are_the_reference(monkeypatch, mode):
    monkeypatch.setattr(indexer, "CHUNK_BYTES", 500)
    monkeypatch.setattr(entries, "PAIR_BYTES", 300)
    monkeypatch.setattr(indexer, "_QUERIES", {INTERPRETER: 4})
    small = {INTERPRETER: Tile({"BT": 16, "BE": 16}, 1, 1)}
    monkeypatch.setattr(indexer, "_KEYS_RANGE", small)
    rows = packed(18, ratio=1) if mode == "range" else packed(3, 2, ratio=1)
    hold(rows, mode, indexer_inputs(rows, 2, 16))


@pytest.mark.parametrize("mode", ["range", "list", ATOMIC])
def test_queries_without_entries_give_zero(mode):
    rows = packed(4, -2, ratio=5)
    inputs = [x.requires_grad_() for x in indexer_inputs(rows, 2, 16)]
    loss = losses(rows, mode)[0](*inputs)
    loss.backward()
    assert loss == 0
    assert not any(x.grad.any() for x in inputs)


# ---- the choice --------------------------------------------------------------------------------
@pytest.mark.parametrize("topk", [1, 3, 99])
@pytest.mark.parametrize("chunk", [1000, 1 << 20])
def test_choice_is_the_reference(monkeypatch, topk, chunk):
    monkeypatch.setattr(indexer, "CHUNK_BYTES", chunk)
    rows = packed(11, 9, -2, ratio=2, batch=2 if topk == 3 else 1)
    inputs = indexer_inputs(rows, 16, 16)
    with poisoned(), shuffled(1):
        got = indexer.index_topk(inputs, rows.first_BT, rows.stop_BT, topk)
    want = index_topk_reference(inputs, rows.first_BT, rows.stop_BT, topk)
    assert got.dtype == torch.int32
    assert torch.equal(got.sort(-1).values, want.sort(-1).values)


def test_choice_of_fp16_is_the_reference():
    """Of small whole numbers, at a scale of 1/8: scores are exact, so ties are ties for both."""
    rows = packed(11, 9, -2, ratio=2)
    q, k, w = (x.sign() * 2 if x.dim() == 4 else x.sign() for x in indexer_inputs(rows, 4, 16))
    inputs = [q.half(), k.half(), w]
    with poisoned(), shuffled(1):
        got = indexer.index_topk(inputs, rows.first_BT, rows.stop_BT, 2)
    want = index_topk_reference(inputs, rows.first_BT, rows.stop_BT, 2)
    assert torch.equal(got.sort(-1).values, want.sort(-1).values)


def test_choice_of_one_token():
    rows = packed(1, ratio=1)
    got = indexer.index_topk(indexer_inputs(rows, 3, 20), rows.first_BT, rows.stop_BT, 4)
    assert got.flatten().tolist() == [0]


def test_equal_scores_go_to_the_lower_entry():
    """Scores of 2, 0 and -0: the last two are equal."""
    rows = packed(8, ratio=1)
    q, k, w = torch.ones(1, 8, 1, 16), torch.zeros(1, 8, 16), torch.ones(1, 8, 1)
    k[0, 3], k[0, 6], k[0, 1] = 0.125, 0.125, -1.0
    w[0, 7] = -1.0  # -0 for the zeros, -2 for entries 3 and 6
    got = indexer.index_topk((q, k, w), rows.first_BT, rows.stop_BT, 4)
    assert got[0, 6].tolist() == [3, 6, 0, 1]
    assert got[0, 7].tolist() == [0, 1, 2, 4]


def test_scores_that_are_not_finite_are_ranked_as_by_the_reference():
    rows = packed(6, ratio=1)
    q, k, w = torch.ones(1, 6, 1, 16), torch.zeros(1, 6, 16), torch.ones(1, 6, 1)
    k[0, 0], k[0, 1], k[0, 2], k[0, 3] = 1.0, math.nan, math.inf, 2.0
    assert indexer.index_topk((q, k, w), rows.first_BT, rows.stop_BT, 3)[0, 5].tolist() == [1, 2, 3]
    k[0, 1] = 0.5
    w[0, 5] = -1.0  # entry 2 is -inf, and visible
    got = indexer.index_topk((q, k, w), rows.first_BT, rows.stop_BT, 6)[0]
    assert got[5].tolist() == [4, 5, 1, 0, 3, 2]
    assert got[1].tolist() == [0, 1, -1, -1, -1, -1]


@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_not_finite_stays_so(chosen):
    case = nonfinite_case(chosen)
    ours = {"attention": attention_reference, "indexer_loss": indexer.indexer_loss}
    for where, bad in planted(case.inputs, torch.bfloat16):  # NaN and inf
        if where.split()[0] not in (("ki", "entries") if chosen else ("qi", "ki", "w")):
            continue
        most = run(case, reference, bad)
        least = run(case, lambda name: case.seen.get(name) or reference(name), bad)
        got = run(case, ours.get, bad)
        for name in most:
            compare(f"{where}: {name}", got[name], least[name], most[name], wide=True)


# ---- tracing and faults ------------------------------------------------------------------------
def traced(rows, mode, inputs, teacher):
    q, lse, table = teacher
    used = rows.entry_set(table, mode)
    with counted() as launches:
        outputs, found = gradients(
            lambda *x: indexer.indexer_loss(x, q, lse, used, deterministic=mode != ATOMIC),
            inputs,
            [torch.ones_like(lse[0, 0, 0])],
        )
        index = indexer.index_topk(inputs, rows.first_BT, rows.stop_BT, 2)
    return [(x.shape, x.dtype) for x in (*outputs, *found, index)], dict(launches)


@pytest.mark.parametrize("mode", ["range", "list", ATOMIC])
def test_a_trace_has_the_shapes_and_launches_of_a_run(mode):
    rows = packed(3, 2, ratio=1)
    inputs = indexer_inputs(rows, 2, 16, torch.float16)
    q, lse, used = attention_of(rows, mode)
    teacher = (q.half(), lse, used.kv_BEK.half())
    real = traced(rows, mode, inputs, teacher)
    meta = type(rows)(*(x.to("meta") for x in rows[:4]), rows.entries)
    on_meta = [[x.to("meta") for x in group] for group in (inputs, teacher)]
    assert traced(meta, mode, *on_meta) == real
    with FakeTensorMode() as fake:
        rows = type(rows)(*(fake.from_tensor(x) for x in rows[:4]), rows.entries)
        faked = [[fake.from_tensor(x) for x in group] for group in (inputs, teacher)]
        assert traced(rows, mode, *faked) == real


def test_operators_pass_opcheck():
    rows = packed(3, ratio=1)
    q, k, w = indexer_inputs(rows, 2, 16)
    first, stop, index = (x.int() for x in rows[1:4])
    teacher, lse, used = attention_of(rows, "list")
    tests = ("test_schema", "test_faketensor")
    inputs = (q, k, w, first, stop)
    torch.library.opcheck(OPS.triton_index_topk.default, (*inputs, 2), test_utils=tests)
    arguments = (*inputs, index, teacher, used.kv_BEK, lse, 0.2, None)
    torch.library.opcheck(OPS.triton_indexer_loss.default, arguments, test_utils=tests)
    back = (*inputs, index, torch.rand(index.shape), torch.tensor(1.0), True)
    torch.library.opcheck(OPS.triton_indexer_loss_backward.default, back, test_utils=tests)


FAULTS = (
    ("index_scores", "range", "score += s * w[:, None]", "score += s"),
    ("list_scores", "list", "s * w[:, None], 0.0)", "s, 0.0)"),
    ("divergence", "range", "tl.exp(log_p) * taught - teacher", "tl.exp(log_p) - 2 * teacher"),
    ("list_grad_queries", "list", "dq * grad", "dq"),
    ("list_grad_pairs", "list", "w[None, :] * ds[:, None]", "ds[:, None]"),
    ("list_grad_pairs_atomic", ATOMIC, "SUM + of_row + at", "SUM + of_row + at % L"),
    ("range_grad_queries", "range", "dw * grad, mask=ok", "dw, mask=ok"),
    ("range_grad_keys", "range", "tl.cdiv(tl.maximum(high - low, 0), BT) * J", "J - 1"),
)


@pytest.mark.parametrize(("kernel", "mode", "old", "new"), FAULTS)
def test_a_fault_is_found(monkeypatch, tmp_path, kernel, mode, old, new):
    rows = packed(4, 2, ratio=1)
    ours, plain = losses(rows, mode)
    inputs, grads = indexer_inputs(rows, 2, 16), [torch.tensor(0.7)]
    with in_float64():
        exact = gradients(plain, doubled(inputs), grads)
    monkeypatch.setattr(
        indexer, kernel, getattr(mutant(indexer_kernels, old, new, tmp_path), kernel)
    )
    got = gradients(ours, inputs, grads)
    pairs = zip((*got[0], *got[1]), (*exact[0], *exact[1]), strict=True)
    worst = max(distance(a, b) for a, b in pairs)
    assert math.isnan(worst) or worst > 1e-3
