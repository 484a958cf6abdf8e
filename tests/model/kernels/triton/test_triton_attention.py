"""Attention in Triton against float64, in the interpreter: forward, backward, tracing, faults.

Bounds are those of ``checks.py``; lse and mass are sums of a few exponentials of fp32 scores.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels.attention import EntrySet, attention_reference, entry_mask
from model.kernels.triton import attention, attention_kernels, attention_tiles, entries
from model.kernels.triton.launch import INTERPRETER, OPS, Tile, counted
from tests.helpers import relative
from tests.model.kernels.op_cases import attention as nonfinite_case
from tests.model.kernels.op_cases import reference, run
from tests.model.kernels.test_nonfinite import compare, planted
from tests.model.kernels.triton.attention_cases import ATOMIC, MODES, Rows, mutant, packed
from tests.model.kernels.triton.checks import (
    check,
    distance,
    doubled,
    gradients,
    in_float64,
    poisoned,
    shuffled,
)

WINDOW = 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def use(monkeypatch, mode):
    """A choice is met as this mode says."""
    monkeypatch.setattr(attention, "masks_choice", lambda *_: mode == "bits")


def inputs(rows, heads, K, dtype=torch.float32, size=1.0):
    """q, kv and entries in ``dtype``, the sink in fp32."""
    B, T = rows.start_BT.shape
    q, kv = torch.randn(B, T, heads, K), torch.randn(B, T, K)
    table = torch.randn(B, rows.entries, K)
    q, kv, table = (x.mul(size).to(dtype) for x in (q, kv, table))
    return [q, kv, torch.randn(heads), table]


def op(implementation, rows, mode, window=WINDOW):
    """o and lse of the four inputs."""
    ours = implementation is attention.attention
    more = {"deterministic": False} if ours and mode == ATOMIC else {}

    def call(q, kv, sink, table):
        used = rows.entry_set(table, mode)
        return tuple(implementation(q, kv, sink, rows.start_BT, window, used, **more)[:2])

    return call


def hold(rows, mode, tensors, window=WINDOW):
    """dsink is a sum over queries whose terms cancel: their sizes measure it.

    A score s in fp32 is off by |s| 2^-24 or so, and its exponential by as much of itself, whichever
    way the sums go: at scores of 50 that is above the rounding of what is summed.
    """
    ours, plain = (op(f, rows, mode, window) for f in (attention.attention, attention_reference))
    grad = torch.randn_like(tensors[0], dtype=torch.float32)
    with in_float64():
        o, lse = plain(*doubled(tensors))
    terms = (tensors[2] - lse).exp() * (o * grad).abs().sum(-1)
    q, keys = tensors[0].float(), torch.cat((tensors[1], tensors[3]), dim=1).float()
    largest = (torch.einsum("bthk,bsk->bths", q, keys) * q.shape[-1] ** -0.5).abs().max()
    norms = {2: terms.sum((0, 1)).norm()}
    least = float(largest) * 2.0**-24
    check(ours, plain, tensors, [grad, None], norms, least, ordered=mode != ATOMIC)


@pytest.mark.parametrize("mode", MODES)
def test_queries_of_a_shard_with_the_keys_before_match_whole_rows(monkeypatch, mode):
    """Each query meets the same keys, in other tiles: fp32 sums of another order."""
    use(monkeypatch, mode)
    rows = packed(9, 14, -1)
    q, kv, sink, table = inputs(rows, 2, 16)
    used = rows.entry_set(table, mode)
    whole = attention_reference(q, kv, sink, rows.start_BT, WINDOW, used)
    begin, first = 13, 13 - WINDOW + 1
    if used is not None:
        index_BTN = None if used.index_BTN is None else used.index_BTN[:, begin:]
        used = EntrySet(table, used.first_BT[:, begin:], used.stop_BT[:, begin:], index_BTN)
    start_BT = (rows.start_BT[:, begin:] - first).clamp(min=0)
    part = attention.attention(q[:, begin:], kv[:, first:], sink, start_BT, WINDOW, used)
    assert relative(part.o_BTHK, whole.o_BTHK[:, begin:]) < 2e-6
    assert relative(part.lse_BTH, whole.lse_BTH[:, begin:]) < 2e-6
    assert (part.mass_BTN is not None) == (mode in ("list", "bits"))


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        *((mode, torch.float32) for mode in (*MODES, ATOMIC)),
        ("range", torch.float16), ("list", torch.float16), (ATOMIC, torch.float16),
    ],
)  # fmt: skip
def test_attention_is_the_reference(monkeypatch, mode, dtype):
    use(monkeypatch, mode)
    rows = packed(3, 6, -1)
    hold(rows, mode, inputs(rows, 3, 32, dtype))


@pytest.mark.parametrize(
    ("mode", "size"), [("range", 1e-4), ("list", 3.0), ("bits", 3.0), (ATOMIC, 3.0), (ATOMIC, 1e-4)]
)
def test_small_and_large_activations(monkeypatch, mode, size):
    """3: scores of about +-50, so one key takes nearly all."""
    use(monkeypatch, mode)
    rows = packed(6)
    hold(rows, mode, inputs(rows, 2, 32, size=size))


@pytest.mark.parametrize(
    ("mode", "documents", "heads", "K", "more"),
    [
        ("bits", (1,), 1, 32, {}),
        ("list", (1,), 1, 32, {}),
        ("bits", (2, 1), 128, 32, {"ratio": 1}),
        ("list", (3,), 96, 32, {"ratio": 1}),
        ("none", (31, 40), 3, 32, {}),
        ("bits", (3, 2), 12, 64, {"batch": 2, "chosen": 5, "ratio": 2}),
        ("list", (2, 1), 12, 64, {"batch": 2, "chosen": 5, "ratio": 1}),
        ("range", (9,), 4, 128, {}),
        ("list", (4,), 2, 512, {}),
        ("bits", (3, 2), 6, 512, {"ratio": 1}),
        ("range", (9,), 5, 20, {"ratio": 2}),
        (ATOMIC, (1,), 1, 32, {}),
        (ATOMIC, (3,), 128, 32, {"ratio": 1}),
        (ATOMIC, (7, 5), 3, 20, {"ratio": 2}),
        (ATOMIC, (2, 1), 12, 64, {"batch": 2, "chosen": 5, "ratio": 1}),
        (ATOMIC, (3,), 4, 128, {"ratio": 1}),
        (ATOMIC, (4,), 2, 512, {}),
    ],
)
def test_shapes(monkeypatch, mode, documents, heads, K, more):
    """One token, tiles that are not full, a head dim that is no power of two, N above E."""
    use(monkeypatch, mode)
    rows = packed(*documents, **more)
    hold(rows, mode, inputs(rows, heads, K))


def test_bits_span_words_where_entries_do_not_come_from_the_row(monkeypatch):
    """As in generation: the entries of a cache, all visible, and three new tokens."""
    use(monkeypatch, "bits")
    E = 70
    index_BTN = torch.stack([torch.randperm(E)[:5] for _ in range(3)])[None]
    zero_BT = torch.zeros(1, 3, dtype=torch.int64)
    rows = Rows(zero_BT, zero_BT, zero_BT + E, index_BTN, E)
    hold(rows, "bits", inputs(rows, 1, 16))


@pytest.mark.parametrize("mode", ["list", "bits", ATOMIC])
def test_queries_that_choose_nothing(monkeypatch, mode):
    use(monkeypatch, mode)
    rows = packed(4)
    rows.index_BTN.fill_(-1)
    tensors = inputs(rows, 2, 32)
    hold(rows, mode, tensors)
    result = attention.attention(
        *tensors[:3], rows.start_BT, WINDOW, rows.entry_set(tensors[3], mode)
    )
    assert not result.mass_BTN.any()


def small_tiles(monkeypatch, turned):
    """Several steps, parts of channels and splits of queries even in short rows."""
    sizes = {"ROWS": 16, "BN": 16, "CHANNELS": 16, "TURNED": turned}
    monkeypatch.setattr(attention_tiles, "_INTERPRETED", {INTERPRETER: Tile(sizes, 1, 1)})
    monkeypatch.setattr(attention, "_QUERIES", {INTERPRETER: 4})


@pytest.mark.parametrize(
    ("mode", "turned"),
    [("range", True), ("list", True), ("bits", True), ("bits", False), (ATOMIC, False)],
)
def test_every_way_to_tile_is_the_reference(monkeypatch, mode, turned):
    use(monkeypatch, mode)
    small_tiles(monkeypatch, turned)
    monkeypatch.setattr(entries, "PAIR_BYTES", 1000)  # four queries at once
    documents = (3, 2) if mode in ("list", ATOMIC) else (5, 6)
    rows = packed(*documents, ratio=1, chosen=3)
    hold(rows, mode, inputs(rows, 2, 32), window=5)


@pytest.mark.parametrize("mode", ["range", "list"])
def test_mass_is_the_probability_summed_over_heads(monkeypatch, mode):
    use(monkeypatch, mode)
    rows = packed(4, 3, -1, ratio=2, chosen=3)
    q, kv, sink, table = inputs(rows, 5, 32)
    used = rows.entry_set(table, mode)
    lse = attention.attention(q, kv, sink, rows.start_BT, WINDOW, used).lse_BTH
    with poisoned(), shuffled(1):
        mass = attention.mass_of(q, lse, used)
    scores = torch.einsum("bthk,bek->bthe", q.double(), table.double()) * 32**-0.5
    exact = (scores - lse.double()[..., None]).exp().sum(2).masked_fill(~entry_mask(used), 0.0)
    if mode == "list":
        index = rows.index_BTN
        exact = torch.where(index < 0, 0.0, exact.gather(2, index.clamp(min=0)))
    assert relative(mass, exact) < 1e-6


@pytest.mark.parametrize("mode", ["list", "bits", ATOMIC])
def test_bf16_keys_beside_an_fp32_sink_keep_their_dtypes(monkeypatch, mode):
    """The logic alone: the interpreter's bf16 gives no tolerance."""
    use(monkeypatch, mode)
    rows = packed(4, 3)
    tensors = inputs(rows, 2, 16, torch.bfloat16)
    grads = [torch.randn_like(tensors[0]), None]
    outputs, found = gradients(op(attention.attention, rows, mode), tensors, grads)
    plain = op(attention_reference, rows, mode)
    wanted, exact = gradients(plain, [x.float() for x in tensors], grads)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [x.dtype for x in (*outputs, *found)] == [bf16, fp32, bf16, bf16, fp32, bf16]
    for ours, want in zip((*outputs, *found), (*wanted, *exact), strict=True):
        assert relative(ours, want) < 0.1


@pytest.mark.parametrize("chosen", [False, True])
def test_what_is_not_finite_stays_so(chosen):
    """As ``test_nonfinite.py`` asks of the other fast kernels."""
    case = nonfinite_case(chosen)
    ours = {"attention": attention.attention}
    for where, bad in planted(case.inputs, torch.bfloat16):  # NaN and inf
        if chosen and "inf" in where and "sink" not in where:
            continue
        most = run(case, reference, bad)
        least = run(case, lambda name: case.seen.get(name) or reference(name), bad)
        got = run(case, ours.get, bad)
        for name in most:
            compare(f"{where}: {name}", got[name], least[name], most[name], wide=True)


# ---- tracing -----------------------------------------------------------------------------------
def traced(rows, mode, tensors, device=None):
    """(shape, dtype) of results and gradients, and the kernels that were launched."""
    if device is not None:
        tensors = [x.to(device) for x in tensors]
        rows = type(rows)(*(x.to(device) for x in rows[:4]), rows.entries)
    grads = [torch.ones_like(tensors[0]), None]
    with counted() as launches:
        outputs, found = gradients(op(attention.attention, rows, mode), tensors, grads)
    described = [None if x is None else (x.shape, x.dtype) for x in (*outputs, *found)]
    return described, dict(launches)


@pytest.mark.parametrize("mode", ["none", "list", "bits", ATOMIC])
def test_a_trace_has_the_shapes_and_launches_of_a_run(monkeypatch, mode):
    use(monkeypatch, mode)
    rows = packed(3, 2, ratio=1)
    tensors = inputs(rows, 2, 32, torch.float16)
    real = traced(rows, mode, tensors)
    assert traced(rows, mode, tensors, "meta") == real
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        rows = type(rows)(*(fake.from_tensor(x) for x in rows[:4]), rows.entries)
        assert traced(rows, mode, [fake.from_tensor(x) for x in tensors]) == real


def test_operators_pass_opcheck():
    rows = packed(2, 1, ratio=1)
    q, kv, sink, table = inputs(rows, 2, 32)
    start, first, stop, index = (x.int() for x in rows[:4])
    arguments = (q, kv, sink, start, WINDOW, 0.2, table, first, stop, index, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.triton_pack_bits.default, (index, rows.entries), test_utils=tests)
    torch.library.opcheck(OPS.triton_attention.default, arguments, test_utils=tests)
    o, lse = OPS.triton_attention(*arguments)
    torch.library.opcheck(
        OPS.triton_attention_backward.default, (*arguments, o, lse, o, True), test_utils=tests
    )


# ---- which way, and faults ---------------------------------------------------------------------
def test_a_choice_is_masked_up_to_the_break_even():
    """v4_small on an RTX 4090 up to rows of about 14K tokens, V4-Flash on an H100 to about 11K."""
    small = [attention.masks_choice(12, T // 4, 256, "sm_89") for T in (13000, 16000)]
    flash = [attention.masks_choice(64, T // 4, 512, "sm_90") for T in (11000, 14000)]
    assert small == flash == [True, False]


def test_pairs_that_are_added_atomically_cost_less_so_the_list_serves_sooner():
    """Half of the bytes: v4_small on an RTX 4090 from rows of 8K tokens on."""
    small = [attention.masks_choice(12, T // 4, 256, "sm_89", False) for T in (8000, 9000)]
    assert small == [True, False]


def test_only_atomics_depend_on_the_order_of_programs(monkeypatch):
    """Twelve queries choose one entry; of dq, dkv and dsink, too, bits are equal."""
    use(monkeypatch, ATOMIC)
    rows = packed(16)
    rows.index_BTN.fill_(-1)
    rows.index_BTN[0, 4:, 1] = 0
    tensors = inputs(rows, 1, 16)
    grads, runs = [torch.randn_like(tensors[0]), None], []
    for seed in (0, 1):
        with poisoned(), shuffled(seed):
            runs.append(gradients(op(attention.attention, rows, ATOMIC), tensors, grads)[1])
    assert [torch.equal(a, b) for a, b in zip(*runs, strict=True)] == [True, True, True, False]


FAULTS = (
    ("forward", "bits", "total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)"),
    ("forward", "range", "e[None, :] < stop[:, None]", "e[None, :] <= stop[:, None]"),
    ("forward", "none", "t - (window - 1)", "t - window"),
    ("grad_queries", "list", "p * (dp - delta[:, None])", "p * dp"),
    ("grad_keys", "range", "tl.maximum(high, t + 1)", "tl.maximum(high, t)"),
    ("grad_keys", "none", "e[:, None] <= t[None, :]", "e[:, None] < t[None, :]"),
    ("grad_pairs", "list", "(h < H)[None, :], lse2", "(h < H - 1)[None, :], lse2"),
    ("grad_pairs_atomic", ATOMIC, "SUM + of_row + at", "SUM + of_row + at % K"),
    ("grad_pairs_atomic", ATOMIC, "(e >= 0)[:, None], sem=", "((e >= 0) & (n < 1))[:, None], sem="),
    ("delta", "none", "tl.sum(o * do, 1)", "tl.sum(o, 1)"),
)


@pytest.mark.parametrize(("kernel", "mode", "old", "new"), FAULTS)
def test_a_fault_is_found(monkeypatch, tmp_path, kernel, mode, old, new):
    use(monkeypatch, mode)
    rows = packed(4, 2, ratio=2)
    tensors, grads = inputs(rows, 2, 32), [torch.randn(1, 6, 2, 32), None]
    with in_float64():
        exact = gradients(op(attention_reference, rows, mode, 3), doubled(tensors), grads)

    def error():
        got = gradients(op(attention.attention, rows, mode, 3), tensors, grads)
        pairs = zip((*got[0], *got[1]), (*exact[0], *exact[1]), strict=True)
        return max(distance(a, b) for a, b in pairs if b is not None)

    if kernel == "delta":
        assert error() < 1e-4  # without a fault

    faulty = mutant(attention_kernels, old, new, tmp_path)
    name = f"attention_{kernel}"
    monkeypatch.setattr(attention, name, getattr(faulty, name))
    found = error()
    assert math.isnan(found) or found > 1e-3
