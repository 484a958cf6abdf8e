"""A kernel never turns a NaN or an infinity into a number: not in a result, not in a gradient.

Every floating input of every op, the incoming gradients included, gets NaN (also one with all bits
set, as erased memory has it), +inf and -inf at one place. The fast op must then be NaN where the
reference is, not finite where the reference is not, and right everywhere else.

One thing is not asked for: the references multiply masked keys by a weight of zero, so a NaN
reaches queries that do not see it. What has to be NaN is what a query sees (``Case.seen``: the
reference, one query at a time), what may be NaN is what the reference says.
In bf16 more may be: on a CPU with AMX torch's own matmul multiplies the padding of its tiles by the
NaN of a neighbouring row. The references compute on fp32 copies, so they are free of that.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.kernels import cpu_build
from model.kernels.indexer import index_scores
from model.kernels.select import _OPS
from tests.model.kernels.op_cases import (
    FP32_IN_BF16,
    Packed,
    Tensors,
    attention,
    cases,
    fast,
    indexer_inputs,
    reference,
    run,
)

ERASED = struct.unpack("f", b"\xff\xff\xff\xff")[0]
PLANTED = {
    torch.float32: (math.nan, ERASED, math.inf, -math.inf),
    torch.bfloat16: (math.nan, math.inf),
}


def planted(inputs: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, Tensors]]:
    """Every input with every value somewhere in its middle."""
    for name, tensor in inputs.items():
        if name == "to_loss":  # a factor of every gradient, of zeros too
            continue
        for value in PLANTED[dtype]:
            bad = tensor.clone()
            bad.view(-1)[tensor.numel() * 3 // 5] = value
            yield f"{name} holds {value}", inputs | {name: bad}


def compare(where: str, got: Tensor, least: Tensor, most: Tensor, wide: bool) -> None:
    """``got`` is not finite where ``least`` is not; in fp32 it is finite wherever ``most`` is.

    Values: fp32 sums in other orders; in bf16 five roundings of 2^-8.
    """
    tolerance = 1e-5 if wide else 2e-2
    got, least, most = got.double(), least.double(), most.double()
    swallowed = int((got.isfinite() & ~least.isfinite()).sum())
    made_infinite = int((~got.isnan() & least.isnan()).sum())
    spread = int((~got.isfinite() & most.isfinite()).sum())
    assert (swallowed, spread * wide) == (0, 0), where
    assert made_infinite == 0 or "nan" not in where, where
    want, mine = (t.where(got.isfinite() & most.isfinite(), 0.0) for t in (most, got))
    assert float((mine - want).abs().max()) <= tolerance * float(1 + want.abs().max()), where


def implementations() -> Iterator[str]:
    """With the C++ of this machine, then as without a compiler."""
    yield "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "compiler", lambda: None)
        patch.setattr(cpu_build, "_LIBRARIES", {})
        yield "torch"


# Ops with another implementation on a CPU than their reference.
SEVERAL = [name for name, op in sorted(_OPS.items()) if op.compiled or op.torch is not op.reference]


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op_name", [name for name in SEVERAL if name != "index_topk"])
def test_what_is_not_finite_stays_so(op_name, dtype):
    for case in cases()[op_name]:
        keep = FP32_IN_BF16 if op_name != "grouped_linear" else ()
        good = {n: t if n in keep else t.to(dtype) for n, t in case.inputs.items()}
        assert all(t.isfinite().all() for t in run(case, fast, good).values())
        for where, inputs in planted(good, dtype):
            exact = {name: tensor.float() for name, tensor in inputs.items()}
            least = most = run(case, reference, exact)
            if case.seen:
                least = run(
                    case, lambda name, seen=case.seen: seen.get(name) or reference(name), exact
                )
            for implementation in implementations():
                got = run(case, fast, inputs)
                for name in most:
                    label = f"{implementation}, {where}: {name}"
                    compare(label, got[name], least[name], most[name], dtype is torch.float32)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_are_not_finite_are_chosen_as_by_the_reference(dtype):
    """NaN first, -inf last, equal scores in any order; all that is visible is taken if it fits."""
    rows = Packed()
    good = {n: t.to(dtype) if n != "w" else t for n, t in indexer_inputs().items()}
    for where, t in planted(good, dtype):
        indexer = (t["qi"], t["ki"], t["w"])
        scores_TE = index_scores(*indexer)[0]
        for topk in (1, 2, 99):
            want = reference("index_topk")(indexer, rows.first_BT, rows.stop_BT, topk)[0]
            for implementation in implementations():
                got = fast("index_topk")(indexer, rows.first_BT, rows.stop_BT, topk)[0]
                for q in range(rows.tokens):
                    visible = range(int(rows.first_BT[0, q]), int(rows.stop_BT[0, q]))
                    values = []
                    for index in (got, want):
                        chosen = [e for e in index[q].tolist() if e >= 0]
                        assert len(set(chosen)) == len(chosen) == min(topk, len(visible)), where
                        assert set(chosen) <= set(visible), where
                        values.append(sorted(map(str, scores_TE[q, chosen].tolist())))
                    assert values[0] == values[1], f"{implementation}, {where}"


def test_a_nan_key_reaches_only_the_queries_that_see_it():
    """The compiled kernels never read a masked key (the references do, see above)."""
    case = attention(chosen=True)
    inputs = case.inputs | {
        "kv": case.inputs["kv"].clone(),
        "entries": case.inputs["entries"].clone(),
    }
    inputs["kv"][0, 12], inputs["entries"][0, 3] = math.nan, math.nan  # of the second document
    got = run(case, fast, inputs)
    assert got["o"][0, :11].isfinite().all()
    assert got["dq"][0, :11].isfinite().all()
    assert got["dkv"][0, :11].isfinite().all()
    assert got["o"][0, 12:16].isnan().all()


def test_every_op_is_tested():
    assert sorted(cases()) == SEVERAL
