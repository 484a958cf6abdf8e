"""One small problem for every op of ``model/kernels/select.py``: inputs, and how it is run.

Tests walk the table of ops with these, so an op without a case fails them.
"""

# Legend: B rows, T tokens, H heads, K head dim, E entries, J, L indexer heads and head dim
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import Kernels
from model.kernels.attention import AttentionResult, EntrySet, attention_reference
from model.kernels.indexer import indexer_loss_reference
from model.kernels.select import select

Tensors = dict[str, Tensor]
WINDOW, TOPK = 4, 2


class Case(NamedTuple):
    """How one op is run.

    Attributes:
        inputs: floating inputs by name; those that begin with ``to_`` are incoming gradients.
        call: (op by name, inputs) -> results by name.
        fixed: inputs that no gradient flows to.
        seen: ops that replace the reference where a NaN must not spread through masked keys.
    """

    inputs: Tensors
    call: Callable[[Callable[[str], Any], Tensors], Tensors]
    fixed: tuple[str, ...] = ()
    seen: dict[str, Callable[..., Any]] | None = None


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


# ---- the ops -----------------------------------------------------------------------------------
B, H, K, J, L = 1, 2, 16, 3, 16


class Packed:
    """Rows of a document of 11 tokens, one of 5 and padding; entries of 3 tokens: 3, 1, one unseen.

    Args:
        copies: how often this stands in the row.

    Attributes:
        start_BT: first token that each query may see.
        first_BT: first visible entry.
        stop_BT: one past the last visible entry.
        index_BTN: up to two of the visible entries, in no order.
    """

    def __init__(self, copies: int = 1) -> None:
        start, first, stop = [], [], []
        for n in range(copies):
            t, e = 18 * n, 5 * n
            start += [t] * 11 + [t + 11] * 5 + [t + 17, t + 18]
            first += [e] * 11 + [e + 3] * 5 + [0] * 2
            stop += [e + (i + 1) // 3 for i in range(11)] + [e + 3] * 2 + [e + 4] * 3 + [0] * 2
        self.tokens, self.entries = 18 * copies, 5 * copies
        self.start_BT, self.first_BT, self.stop_BT = map(torch.tensor, ([start], [first], [stop]))
        self.index_BTN = torch.full((B, self.tokens, TOPK), -1)
        for t in range(self.tokens):
            visible = sorted(range(first[t], stop[t]), key=lambda e, t=t: (e * 7 + t) % 5)
            for n, e in enumerate(visible[:TOPK]):
                self.index_BTN[0, t, n] = e

    def entry_set(self, kv_BEK: Tensor, chosen: bool) -> EntrySet:
        index = self.index_BTN if chosen else None
        return EntrySet(kv_BEK, self.first_BT, self.stop_BT, index)


def attention(chosen: bool, copies: int = 1) -> Case:
    rows = Packed(copies)
    T, E = rows.tokens, rows.entries

    def call(op, t):
        entries = rows.entry_set(t["entries"], chosen)
        result = op("attention")(t["q"], t["kv"], t["sink"], rows.start_BT, WINDOW, entries)
        return {"o": result.o_BTHK, "lse": result.lse_BTH}

    inputs = {
        "q": normal(B, T, H, K), "kv": normal(B, T, K, seed=1), "sink": normal(H, seed=2),
        "entries": normal(B, E, K, seed=3), "to_o": normal(B, T, H, K, seed=4),
    }  # fmt: skip
    return Case(inputs, call, seen={"attention": attention_seen})


def indexer_inputs(copies: int = 1) -> Tensors:
    T, E = 18 * copies, 5 * copies
    qi, ki, w = normal(B, T, J, L, seed=5), normal(B, E, L, seed=6), normal(B, T, J, seed=7)
    return {"qi": qi, "ki": ki, "w": w}


def indexer_loss(chosen: bool, copies: int = 1) -> Case:
    rows = Packed(copies)

    def call(op, t):
        entries = rows.entry_set(t["entries"], chosen)
        with torch.no_grad():
            found = op("attention")(t["q"], t["kv"], t["sink"], rows.start_BT, WINDOW, entries)
        indexer = (t["qi"], t["ki"], t["w"])
        arguments = (indexer, t["q"], found.lse_BTH, entries, found.mass_BTN)
        return {"loss": op("indexer_loss")(*arguments)}

    inputs = attention(chosen, copies).inputs | indexer_inputs(copies)
    inputs["to_loss"] = torch.tensor(0.7)
    del inputs["to_o"]
    seen = {"attention": attention_seen, "indexer_loss": loss_seen}
    return Case(inputs, call, ("q", "kv", "sink", "entries"), seen)


def grouped_linear() -> Case:
    offsets = torch.tensor([3, 3, 9], dtype=torch.int32)  # the second expert has no row
    inputs = {"x": normal(9, 16), "w": normal(3, 32, 16, seed=1), "to_y": normal(9, 32, seed=2)}
    return Case(inputs, lambda op, t: {"y": op("grouped_linear")(t["x"], t["w"], offsets)})


def rms_norm() -> Case:
    inputs = {"x": normal(5, 21), "weight": normal(21, seed=1), "to_y": normal(5, 21, seed=2)}
    return Case(inputs, lambda op, t: {"y": op("rms_norm")(t["x"], t["weight"], 1e-6)})


def swiglu() -> Case:
    inputs = {
        "gate": 9 * normal(5, 21), "up": 9 * normal(5, 21, seed=1), "weight": normal(5, seed=2),
        "to_a": normal(5, 21, seed=3),
    }  # fmt: skip
    return Case(inputs, lambda op, t: {"a": op("swiglu")(t["gate"], t["up"], t["weight"], 10.0)})


def norm_rope() -> Case:
    inputs = rope().inputs | {"weight": normal(24, seed=4)}
    return Case(
        inputs,
        lambda op, t: {"y": op("norm_rope")(t["x"], t["weight"], 1e-6, t["cos"], t["sin"])},
        ("cos", "sin"),
    )


def rope(op_name: str = "rope") -> Case:
    inputs = {
        "x": normal(1, 5, 2, 24), "cos": normal(1, 5, 7, seed=1), "sin": normal(1, 5, 7, seed=2),
        "to_y": normal(1, 5, 2, 24, seed=3),
    }  # fmt: skip
    return Case(
        inputs, lambda op, t: {"y": op(op_name)(t["x"], t["cos"], t["sin"])}, ("cos", "sin")
    )


def mhc(op_name: str) -> Case:
    N, S, D = 19, 4, 24
    inputs = {
        "x": normal(1, N, S, D), "fn": 0.1 * normal((2 + S) * S, S * D, seed=1),
        "base": normal((2 + S) * S, seed=2), "scale": torch.tensor([0.9, 1.3, 1.7]),
    }  # fmt: skip
    outputs = {"u": (1, N, D), "post": (1, N, S), "comb": (1, N, S, S)}

    def call(op, t):
        if op_name == "mhc_head":
            parameters = (t["fn"][:S], t["base"][:S], t["scale"][:1])
            return {"u": op("mhc_head")(t["x"], *parameters, 1e-6, 1e-6)}
        parameters = (t["fn"], t["base"], t["scale"], 20, 1e-6, 1e-6)
        u, mix = op("mhc_pre")(t["x"], *parameters)
        if op_name == "mhc_merge_pre":
            u, mix = op("mhc_merge_pre")(t["y"] + u, mix, *parameters)
        if op_name == "mhc_merge":
            return {"u": u, "new": op("mhc_merge")(t["y"], mix)}
        return {"u": u, "post": mix.post_BTS, "comb": mix.comb_BTSS}

    if op_name == "mhc_merge_pre":
        inputs["y"] = normal(1, N, D, seed=3)
    if op_name == "mhc_merge":
        inputs["y"] = normal(1, N, D, seed=3)
        outputs = {"u": (1, N, D), "new": (1, N, S, D)}
    if op_name == "mhc_head":
        outputs = {"u": (1, N, D)}
    inputs |= {f"to_{k}": normal(*v, seed=n) for n, (k, v) in enumerate(outputs.items(), 4)}
    return Case(inputs, call)


def index_topk(copies: int = 1) -> Case:
    rows = Packed(copies)

    def call(op, t):
        indexer = (t["qi"], t["ki"], t["w"])
        return {"index": op("index_topk")(indexer, rows.first_BT, rows.stop_BT, TOPK)}

    return Case(indexer_inputs(copies), call, ("qi", "ki", "w"))


def cases(copies: int = 1) -> dict[str, list[Case]]:
    """Every op's cases; ``copies`` makes the rows of attention and the indexer longer."""
    return {
        "attention": [attention(chosen, copies) for chosen in (False, True)],
        "indexer_loss": [indexer_loss(chosen, copies) for chosen in (False, True)],
        "index_topk": [index_topk(copies)],
        "grouped_linear": [grouped_linear()],
        "rms_norm": [rms_norm()],
        "swiglu": [swiglu()],
        "rope": [rope()],
        "rope_back": [rope("rope_back")],
        "norm_rope": [norm_rope()],
        "mhc_pre": [mhc("mhc_pre")],
        "mhc_merge": [mhc("mhc_merge")],
        "mhc_merge_pre": [mhc("mhc_merge_pre")],
        "mhc_head": [mhc("mhc_head")],
    }


FP32_IN_BF16 = ("sink", "w", "weight", "cos", "sin", "fn", "base", "scale", "to_post", "to_comb")


# ---- what a query sees -------------------------------------------------------------------------
def entries_of(entries: EntrySet, b: int, t: int) -> Tensor:
    if entries.index_BTN is None:
        return entries.kv_BEK[b, int(entries.first_BT[b, t]) : int(entries.stop_BT[b, t])]
    chosen = entries.index_BTN[b, t]
    return entries.kv_BEK[b].index_select(0, chosen[chosen >= 0])


def all_of(keys_EK: Tensor) -> EntrySet:
    zero = torch.zeros(1, 1, dtype=torch.long)
    return EntrySet(keys_EK[None], zero, zero + len(keys_EK))


def attention_seen(q, kv, sink, start, window, entries) -> AttentionResult:
    results = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            low = max(int(start[b, t]), t - window + 1)
            one = q[b : b + 1, t : t + 1]
            if low > t:  # padding
                results.append(AttentionResult(torch.zeros_like(one), sink.detach().float()))
                continue
            keys = all_of(torch.cat((kv[b, low:t], entries_of(entries, b, t))))
            own, start_11 = kv[b : b + 1, t : t + 1], torch.zeros(1, 1, dtype=torch.long)
            results.append(attention_reference(one, own, sink, start_11, 1, keys))
    o, lse = (torch.cat([r[n].flatten() for r in results]) for n in (0, 1))
    return AttentionResult(o.view(q.shape), lse.view(q.shape[:3]))


def loss_seen(indexer, q, lse, entries, mass=None) -> Tensor:
    qi, ki, w = indexer
    keys = EntrySet(ki, entries.first_BT, entries.stop_BT, entries.index_BTN)
    total = torch.zeros(())
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            chosen = entries_of(entries, b, t)
            if len(chosen):
                at = (slice(b, b + 1), slice(t, t + 1))
                one = (qi[at], entries_of(keys, b, t)[None], w[at])
                total = total + indexer_loss_reference(one, q[at], lse[at], all_of(chosen))
    return total


# ---- running them -------------------------------------------------------------------------------
def run(case: Case, op: Callable[[str], Any], inputs: Tensors) -> Tensors:
    """Results, and the gradients of the inputs."""
    leaves = {
        name: t.clone().requires_grad_(name not in case.fixed and not name.startswith("to_"))
        for name, t in inputs.items()
    }
    results = case.call(op, leaves)
    given = {name: leaves[f"to_{name}"] for name in results if f"to_{name}" in leaves}
    torch.autograd.backward([results[name] for name in given], list(given.values()))
    grads = {f"d{name}": t.grad for name, t in leaves.items() if t.requires_grad}
    return {name: t.detach() for name, t in results.items()} | {
        name: t for name, t in grads.items() if t is not None
    }


def fast(name: str) -> Any:
    return select(name, Kernels.fast)


def reference(name: str) -> Any:
    return select(name, Kernels.reference)
