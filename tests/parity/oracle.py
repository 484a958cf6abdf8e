"""A naive float64 reference of the whole model, per token, from reference B.1 to B.11.

It shares nothing with ``model/``: no plan, no masks, no batches. A packed row is cut into its
documents, each document is run alone with plain loops over tokens and entries, and the results are
put back. Only the config dataclass (sizes) is taken from the package.
``tests/parity/test_transformers.py`` proves this file against transformers.

What docs/reference leaves open is fixed here as ARCHITECTURE.md (Objective) words it. Two
conventions of ours: a MTP position whose next token lies beyond its document reads token 0 there
(it has no label, but it is routed and counts in the load); `dense` layers use the RoPE of
window-only layers.
"""

# Legend: T tokens of one document, D hidden, S streams, H heads, K head dim, R query rank,
# E experts or entries, J indexer heads, L indexer head dim, V vocab, P prediction depths
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import LayerKind, ModelConfig, Residual, Router

IGNORE = -1
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class OracleObjective:
    """Same fields as ``model.loss.Objective``."""

    targets_K: tuple[float, ...]
    tokens: float
    mtp_weight: float = 0.3
    indexer_weight: float = 0.01
    balance_weight: float = 1e-4
    indexer_phase: str = "sparse"


@dataclass
class OracleResult:
    """What one run gives; rows of padding hold zeros.

    Attributes:
        logits_BTV: main logits.
        mtp_logits: one [B, T, V] an MTP depth.
        losses: loss, loss_mtp, loss_indexer, loss_balance as ``ModelOutput.losses``.
        total: the objective.
        experts: gate name -> chosen experts {(row, t): ascending}.
        selected: CSA layer name -> chosen entries {(row, t): ascending}, by document.
        expert_load: gate name -> tokens an expert.
        route_margin: smallest gap in score between a token's last chosen and best other expert.
        index_margin: the same for the indexer's entries.
        clamped: share of expert activations that the clamp cut.
    """

    logits_BTV: Tensor
    mtp_logits: list[Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    experts: dict[str, dict[tuple[int, int], tuple[int, ...]]] = field(default_factory=dict)
    selected: dict[str, dict[tuple[int, int], tuple[int, ...]]] = field(default_factory=dict)
    expert_load: dict[str, Tensor] = field(default_factory=dict)
    route_margin: float = math.inf
    index_margin: float = math.inf
    clamped: float = 0.0


@dataclass
class _Tape:
    """What the layers of one document leave behind."""

    row: int
    start: int
    result: OracleResult
    phase: str
    kl: list[Tensor] = field(default_factory=list)  # per CSA layer, sum over tokens
    balance: list[Tensor] = field(default_factory=list)  # per learned gate, sum_e f_e P_e
    num_clamped: int = 0
    num_activations: int = 0


# ---- B.1 RMSNorm, B.4 RoPE ----------------------------------------------------------------------
def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    y = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rope_frequencies(config: ModelConfig, compressed: bool, yarn: bool = True) -> Tensor:
    """Radians per token of a layer's one table; compressed layers have their own base, YaRN."""
    dim = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    scaling = config.rope_scaling
    out = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if compressed and yarn and scaling.factor != 1:

        def corr(rotations: float) -> float:
            positions = scaling.original_max_position_embeddings
            return dim * math.log(positions / (2 * math.pi * rotations)) / (2 * math.log(base))

        low = max(math.floor(corr(scaling.beta_fast)), 0)
        high = min(math.ceil(corr(scaling.beta_slow)), dim - 1)
        for i, f in enumerate(out):
            ramp = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
            out[i] = f / scaling.factor * ramp + f * (1 - ramp)
    return torch.tensor(out, dtype=torch.float64)


def rotate(x: Tensor, position: int | Tensor, freqs: Tensor) -> Tensor:
    """Turn the last channels of ``x [..., K]``, pair (2i, 2i+1) by ``position * freqs[i]``."""
    keep, turn = x[..., : x.shape[-1] - 2 * len(freqs)], x[..., x.shape[-1] - 2 * len(freqs) :]
    cos, sin = torch.cos(position * freqs), torch.sin(position * freqs)
    re, im = turn[..., 0::2], turn[..., 1::2]
    turned = torch.stack([re * cos - im * sin, re * sin + im * cos], dim=-1).flatten(-2)
    return torch.cat([keep, turned], dim=-1)


def positions(x_T: Tensor) -> Tensor:
    """0, 1, 2 ... along the first dim of ``x_T``, shaped to broadcast against its other dims."""
    return torch.arange(len(x_T)).view(-1, *[1] * (x_T.dim() - 1))


# ---- B.2 mHC ------------------------------------------------------------------------------------
def sinkhorn(logits_SS: Tensor, iterations: int, eps: float) -> Tensor:
    """Comb weights [..., source, destination]; a softmax first, a column step last."""
    c = torch.softmax(logits_SS, dim=-1) + eps
    c = c / (c.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(dim=-1, keepdim=True) + eps)
        c = c / (c.sum(dim=-2, keepdim=True) + eps)
    return c


def _mix(x_TSD: Tensor, w: Weights, name: str, config: ModelConfig) -> Tensor:
    flat = x_TSD.flatten(1)
    r = 1 / torch.sqrt((flat * flat).mean(dim=-1, keepdim=True) + config.rms_norm_eps)
    gamma = w.get(f"{name}_gamma")
    return ((flat if gamma is None else flat * gamma) @ w[f"{name}_fn"].T) * r


def hyper_connection(
    x_TSD: Tensor, w: Weights, name: str, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(sublayer input [T, D], post [T, S], comb [T, S, S])."""
    n = config.hc_mult
    scale, base = w[f"{name}_scale"], w[f"{name}_base"]
    mix = _mix(x_TSD, w, name, config)
    pre = torch.sigmoid(scale[0] * mix[:, :n] + base[:n]) + config.hc_eps
    post = 2 * torch.sigmoid(scale[1] * mix[:, n : 2 * n] + base[n : 2 * n])
    comb = (scale[2] * mix[:, 2 * n :] + base[2 * n :]).view(-1, n, n)
    comb = sinkhorn(comb, config.hc_sinkhorn_iters, config.hc_eps)
    u = torch.stack([pre[:, j, None] * x_TSD[:, j] for j in range(n)]).sum(dim=0)
    return u, post, comb


def collapse(x_TSD: Tensor, w: Weights, name: str, config: ModelConfig) -> Tensor:
    if config.residual == Residual.plain:
        return x_TSD[:, 0]
    mix = _mix(x_TSD, w, name, config)
    weight = torch.sigmoid(w[f"{name}_scale"] * mix + w[f"{name}_base"]) + config.hc_eps
    streams = [weight[:, j, None] * x_TSD[:, j] for j in range(config.hc_mult)]
    return torch.stack(streams).sum(dim=0)


def sublayer(x_TSD, w, name, config, apply) -> Tensor:
    """One sublayer under mHC: ``X'_k = post_k F(u) + sum_j C[j, k] X_j``."""
    if config.residual == Residual.plain:
        return x_TSD + apply(x_TSD[:, 0])[:, None]
    u, post, comb = hyper_connection(x_TSD, w, name, config)
    out = apply(u)
    streams = []
    for k in range(config.hc_mult):
        carried = sum(comb[:, j, k, None] * x_TSD[:, j] for j in range(config.hc_mult))
        streams.append(post[:, k, None] * out + carried)
    return torch.stack(streams, dim=1)


# ---- B.5 compressor, B.7 indexer ----------------------------------------------------------------
def compress(
    u_TD: Tensor, w: Weights, name: str, ratio: int, overlap: bool, config, freqs
) -> list[Tensor]:
    """The entries of one document, in order."""
    k_all, z_all = u_TD @ w[f"{name}.wkv.weight"].T, u_TD @ w[f"{name}.wgate.weight"].T
    ape, norm = w[f"{name}.ape"], w[f"{name}.norm.weight"]
    c = norm.shape[0]
    entries = []
    for i in range(len(u_TD) // ratio):
        values, scores = [], []
        if overlap and i > 0:
            for j in range(ratio):
                t = (i - 1) * ratio + j
                values.append(k_all[t, :c])
                scores.append(z_all[t, :c] + ape[j, :c])
        for j in range(ratio):
            t = i * ratio + j
            own = slice(c, 2 * c) if overlap else slice(0, c)
            values.append(k_all[t, own])
            scores.append(z_all[t, own] + ape[j, own])
        weight = torch.softmax(torch.stack(scores), dim=0)
        entry = rms_norm((weight * torch.stack(values)).sum(dim=0), config.rms_norm_eps, norm)
        entries.append(rotate(entry, i * ratio, freqs))
    return entries


def index_scores(u_TD, qr_TR, w, name, ratio, config, freqs) -> list[Tensor]:
    """Each query's scores over its visible entries (there may be none); inputs detached."""
    u_TD, qr_TR = u_TD.detach(), qr_TR.detach()
    keys = compress(u_TD, w, f"{name}.compressor", ratio, True, config, freqs)
    weight_TJ = u_TD @ w[f"{name}.weights_proj.weight"].T
    weight_TJ = weight_TJ * config.index_head_dim**-0.5 * config.index_n_heads**-0.5
    J, L = config.index_n_heads, config.index_head_dim
    q_TJL = (qr_TR @ w[f"{name}.wq_b.weight"].T).view(-1, J, L)
    q_TJL = rotate(q_TJL, positions(q_TJL), freqs)
    if not keys:
        return [torch.zeros(0)] * len(u_TD)
    keys_EL = torch.stack(keys)
    out = []
    for t in range(len(u_TD)):
        closeness_JE = torch.relu(q_TJL[t] @ keys_EL[: (t + 1) // ratio].T)
        out.append((weight_TJ[t, :, None] * closeness_JE).sum(dim=0))
    return out


def top(scores: Tensor, k: int) -> tuple[list[int], float]:
    """The k best places, ties to the lower one, and the gap to the best of the rest."""
    order = torch.sort(scores.detach(), descending=True, stable=True)
    picked = sorted(order.indices[:k].tolist())
    gap = math.inf if len(scores) <= k else float(order.values[k - 1] - order.values[k])
    return picked, gap


# ---- B.3 attention ------------------------------------------------------------------------------
def attention(
    u_TD: Tensor, w: Weights, name: str, kind: LayerKind, ratio: int, config, tape, yarn
) -> Tensor:
    H, K, T = config.num_attention_heads, config.head_dim, len(u_TD)
    eps = config.rms_norm_eps
    freqs = rope_frequencies(config, kind in (LayerKind.csa, LayerKind.hca), yarn)
    qr_TR = rms_norm(u_TD @ w[f"{name}.wq_a.weight"].T, eps, w[f"{name}.q_norm.weight"])
    q_THK = rms_norm((qr_TR @ w[f"{name}.wq_b.weight"].T).view(T, H, K), eps)
    q_THK = rotate(q_THK, positions(q_THK), freqs)
    kv_TK = rms_norm(u_TD @ w[f"{name}.wkv.weight"].T, eps, w[f"{name}.kv_norm.weight"])
    kv_TK = rotate(kv_TK, positions(kv_TK), freqs)
    entries: list[Tensor] = []
    scores: list[Tensor] = []
    if kind in (LayerKind.csa, LayerKind.hca):
        overlap = kind is LayerKind.csa
        entries = compress(u_TD, w, f"{name}.compressor", ratio, overlap, config, freqs)
    if kind is LayerKind.csa:
        scores = index_scores(u_TD, qr_TR, w, f"{name}.indexer", ratio, config, freqs)
    sink_H = w[f"{name}.attn_sink"]
    out, kl = [], torch.zeros((), dtype=torch.float64)
    for t in range(T):
        first = 0 if kind is LayerKind.dense else max(0, t - config.sliding_window + 1)
        visible = list(range((t + 1) // ratio)) if ratio else []
        if kind is LayerKind.csa and visible:
            chosen, gap = top(scores[t], config.index_topk)
            tape.result.index_margin = min(tape.result.index_margin, gap)
            tape.result.selected.setdefault(name, {})[tape.row, tape.start + t] = tuple(chosen)
            if tape.phase == "sparse":
                visible = chosen
        keys = torch.stack([*kv_TK[first : t + 1], *(entries[i] for i in visible)])
        z = q_THK[t] @ keys.T * K**-0.5
        p = torch.softmax(torch.cat([z, sink_H[:, None]], dim=1), dim=1)[:, :-1]
        out.append(rotate(p @ keys, -t, freqs))
        if kind is LayerKind.csa and visible:
            teacher = p[:, t + 1 - first :].sum(dim=0).detach()
            teacher = teacher / teacher.sum()
            student = torch.log_softmax(scores[t][visible], dim=0)
            kl = kl + (torch.xlogy(teacher, teacher) - teacher * student).sum()
    if kind is LayerKind.csa:
        tape.kl.append(kl)
    per_group = torch.stack(out).view(T, config.o_groups, -1)
    wo_a = w[f"{name}.wo_a.weight"].view(config.o_groups, config.o_lora_rank, -1)
    grouped = torch.cat([per_group[:, g] @ wo_a[g].T for g in range(config.o_groups)], dim=-1)
    return grouped @ w[f"{name}.wo_b.weight"].T


# ---- B.9 MoE, B.10 balance ----------------------------------------------------------------------
def expert(
    u_ND: Tensor, w: Weights, name: str, limit: float, weight_N: Tensor, tape: _Tape
) -> Tensor:
    g, v = u_ND @ w[f"{name}.w1.weight"].T, u_ND @ w[f"{name}.w3.weight"].T
    tape.num_clamped += int((g > limit).sum() + (v.abs() > limit).sum())
    tape.num_activations += g.numel() + v.numel()
    g, v = torch.clamp(g, max=limit), torch.clamp(v, min=-limit, max=limit)
    return (weight_N[:, None] * (F.silu(g) * v)) @ w[f"{name}.w2.weight"].T


def moe(u_TD, ids_T, w, name, router: Router, config: ModelConfig, tape: _Tape) -> Tensor:
    E, k, T = config.n_routed_experts, config.num_experts_per_tok, len(u_TD)
    gate = f"{name}.gate"
    load = tape.result.expert_load.setdefault(gate, torch.zeros(E, dtype=torch.float64))
    chosen_all = tape.result.experts.setdefault(gate, {})
    logits = u_TD @ w[f"{gate}.weight"].T
    s = torch.sqrt(torch.log1p(torch.exp(-logits.abs())) + torch.clamp(logits, min=0))
    visits: list[list[tuple[int, Tensor]]] = [[] for _ in range(E)]  # expert -> (token, weight)
    for t in range(T):
        if router is Router.hash:
            chosen = w[f"{gate}.tid2eid"][int(ids_T[t])].tolist()
        else:
            chosen, gap = top(s[t] + w[f"{gate}.bias"], k)
            tape.result.route_margin = min(tape.result.route_margin, gap)
        total = s[t, chosen].sum()
        for e in chosen:
            visits[e].append((t, s[t, e] / total * config.routed_scaling_factor))
        chosen_all[tape.row, tape.start + t] = tuple(sorted(chosen))
    limit, y = config.swiglu_limit, torch.zeros_like(u_TD)
    for e in range(E):
        if visits[e]:
            tokens, weights = [t for t, _ in visits[e]], torch.stack([g for _, g in visits[e]])
            out = expert(u_TD[tokens], w, f"{name}.experts.{e}", limit, weights, tape)
            y = y.index_add(0, torch.tensor(tokens), out)
    if config.n_shared_experts:
        y = y + expert(u_TD, w, f"{name}.shared_experts", limit, torch.ones(T).double(), tape)
    count = torch.tensor([len(v) for v in visits], dtype=torch.float64)
    load += count
    if router is not Router.hash:
        f = count * E / (k * T)
        tape.balance.append((f * (s / s.sum(dim=-1, keepdim=True)).mean(dim=0)).sum())
    return y


# ---- B.1 network, B.11 MTP ----------------------------------------------------------------------
def block(x_TSD, ids_T, w, name, kind, ratio, router, config, tape, yarn) -> Tensor:
    eps = config.rms_norm_eps

    def attend(u: Tensor) -> Tensor:
        u = rms_norm(u, eps, w[f"{name}.attn_norm.weight"])
        return attention(u, w, f"{name}.attn", kind, ratio, config, tape, yarn)

    def feed(u: Tensor) -> Tensor:
        u = rms_norm(u, eps, w[f"{name}.ffn_norm.weight"])
        return moe(u, ids_T, w, f"{name}.ffn", router, config, tape)

    x_TSD = sublayer(x_TSD, w, f"{name}.hc_attn", config, attend)
    return sublayer(x_TSD, w, f"{name}.hc_ffn", config, feed)


def _mtp_input(x_TSD: Tensor, next_T: Tensor, w: Weights, name: str, config: ModelConfig) -> Tensor:
    eps = config.rms_norm_eps
    embedded = rms_norm(w["embed.weight"][next_T], eps, w[f"{name}.enorm.weight"])
    hidden = rms_norm(x_TSD, eps, w[f"{name}.hnorm.weight"])
    return (embedded @ w[f"{name}.e_proj.weight"].T)[:, None] + hidden @ w[
        f"{name}.h_proj.weight"
    ].T


def run_document(
    ids_T: Tensor,
    labels_TP: Tensor | None,
    w: Weights,
    config: ModelConfig,
    tape: _Tape,
    yarn: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Main logits [T, V] and those of each MTP depth (empty without labels)."""
    eps = config.rms_norm_eps
    x = w["embed.weight"][ids_T][:, None].repeat(1, config.num_streams, 1)
    for n in range(config.num_hidden_layers):
        x = block(
            x, ids_T, w, f"layers.{n}", config.kind(n), config.ratio(n), config.router(n), config,
            tape, yarn,
        )  # fmt: skip
    logits = rms_norm(collapse(x, w, "hc_head", config), eps, w["norm.weight"]) @ w["head.weight"].T
    mtp_logits: list[Tensor] = []
    if labels_TP is None:
        return logits, mtp_logits
    for depth in range(config.num_nextn_predict_layers):
        name = f"mtp.{depth}"
        x = _mtp_input(x, labels_TP[:, depth].clamp(min=0), w, name, config)
        x = block(x, ids_T, w, name, LayerKind.swa, 0, Router.learned, config, tape, yarn)
        y = rms_norm(collapse(x, w, f"{name}.hc_head", config), eps, w[f"{name}.norm.weight"])
        mtp_logits.append(y @ w["head.weight"].T)
    return logits, mtp_logits


def cross_entropy_sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over labelled positions, in nats."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(labels_T)):
        if labels_T[t] != IGNORE:
            total = total - torch.log_softmax(logits_TV[t], dim=0)[labels_T[t]]
    return total


def documents(document_ids_T: Tensor) -> list[tuple[int, int]]:
    """Runs of equal ids as (start, stop), padding left out."""
    ids = document_ids_T.tolist()
    cuts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]] + [len(ids)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if ids[a] != -1]


def run_oracle(
    weights: Weights,
    config: ModelConfig,
    input_ids_BT: Tensor,
    document_ids_BT: Tensor | None = None,
    labels_BTK: Tensor | None = None,
    objective: OracleObjective | None = None,
    yarn: bool = True,
) -> OracleResult:
    """Run the reference; gradients flow into ``weights`` (float64 leaves) from ``total``.

    Args:
        weights: official names (reference E.1), experts one by one; ``*_gamma`` if any.
        config: sizes and switches.
        input_ids_BT: token ids.
        document_ids_BT: -1 is padding; None: one document a row.
        labels_BTK: as ``data.batch.Batch``; needed for MTP and losses.
        objective: needed for losses.
        yarn: whether YaRN acts on the compressed layers.
    """
    B, T = input_ids_BT.shape
    if document_ids_BT is None:
        document_ids_BT = torch.zeros_like(input_ids_BT)
    depths = config.num_nextn_predict_layers if labels_BTK is not None else 0
    zeros = torch.zeros(B, T, config.vocab_size, dtype=torch.float64)
    result = OracleResult(zeros, [zeros.clone() for _ in range(depths)])
    zero = torch.zeros((), dtype=torch.float64)
    ce = [zero] * (1 + depths)
    kl: dict[int, Tensor] = {}
    balance: dict[int, Tensor] = {}
    phase = objective.indexer_phase if objective else "sparse"
    activations = clamped = 0
    for row in range(B):
        for start, stop in documents(document_ids_BT[row]):
            tape = _Tape(row, start, result, phase)
            ids = input_ids_BT[row, start:stop]
            labels = None if labels_BTK is None else labels_BTK[row, start:stop]
            every = run_document(ids, labels, weights, config, tape, yarn)
            every = [every[0], *every[1]]
            result.logits_BTV[row, start:stop] = every[0].detach()
            for depth in range(depths):
                result.mtp_logits[depth][row, start:stop] = every[1 + depth].detach()
            if labels is not None:
                ce = [
                    c + cross_entropy_sum(y, labels[:, i])
                    for i, (c, y) in enumerate(zip(ce, every, strict=True))
                ]
            for i, value in enumerate(tape.kl):
                kl[i] = kl.get(i, zero) + value
            for i, value in enumerate(tape.balance):
                balance[i] = balance.get(i, zero) + value * (stop - start)
            clamped, activations = clamped + tape.num_clamped, activations + tape.num_activations
    result.clamped = clamped / max(activations, 1)
    if objective is not None:
        _losses(result, objective, ce, kl, balance)
    return result


def _losses(result, objective, ce, kl: dict[int, Tensor], balance: dict[int, Tensor]) -> None:
    shares = [c / n for c, n in zip(ce, objective.targets_K, strict=True)]
    zero = torch.zeros((), dtype=torch.float64)
    mtp = sum(shares[1:], zero) / max(len(shares) - 1, 1)
    kl_sum = sum(kl.values(), zero) / objective.tokens
    balance_sum = sum(balance.values(), zero) / objective.tokens
    losses = {
        "loss": shares[0],
        "loss_mtp": mtp,
        "loss_indexer": kl_sum / max(len(kl), 1),
        "loss_balance": balance_sum / max(len(balance), 1),
    }
    result.losses = {name: value.detach() for name, value in losses.items()}
    result.total = (
        shares[0]
        + objective.mtp_weight * mtp
        + objective.indexer_weight * kl_sum
        + objective.balance_weight * balance_sum
    )
