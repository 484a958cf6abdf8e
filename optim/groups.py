"""Who owns which parameter: an explicit table, in which each parameter matches exactly once.

DeepSeek-V4 section 2.4 gives embedding, head, RMSNorm weights and the static mHC biases and
factors to AdamW and all other modules to Muon. What the report leaves open (reference C.1, H):
``ape`` and ``attn_sink`` go to AdamW; vectors that are not norms take no weight decay; ``wo_a`` is
one matrix per output group and every expert is its own matrix.

Pattern language: ``<block>`` is ``layers.N`` or ``mtp.N``, ``<n>`` a number, ``{a,b}`` one of the
words; everything else is literal and the whole name must match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from optim.config import OptimConfig, OptimizerName
from optim.errors import ConfigError


class Owner(StrEnum):
    """The algorithm that moves a parameter."""

    muon = "muon"
    adamw = "adamw"


WHOLE, EXPERTS = "whole", "experts"


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        pattern: of fully qualified names (see the module docstring).
        owner: muon stands for the algorithm of the matrices, which is ``optim.name``'s.
        split: ``whole``; ``experts`` (a stack [E, out, in]); or the name of a count that cuts the
            rows.
        decay: whether the owner's weight decay applies.
    """

    pattern: str
    owner: Owner
    split: str = WHOLE
    decay: bool = True


TABLE: tuple[Rule, ...] = (
    Rule("embed.weight", Owner.adamw),
    Rule("head.weight", Owner.adamw),
    Rule("norm.weight", Owner.adamw),
    Rule("<block>.{attn_norm,ffn_norm}.weight", Owner.adamw),
    Rule("<block>.attn.{q_norm,kv_norm}.weight", Owner.adamw),
    Rule("<block>.attn.compressor.norm.weight", Owner.adamw),
    Rule("<block>.attn.indexer.compressor.norm.weight", Owner.adamw),
    Rule("mtp.<n>.{enorm,hnorm,norm}.weight", Owner.adamw),
    Rule("<block>.{hc_attn,hc_ffn}.{base,scale,gamma}", Owner.adamw, decay=False),
    Rule("hc_head.{base,scale,gamma}", Owner.adamw, decay=False),
    Rule("mtp.<n>.hc_head.{base,scale,gamma}", Owner.adamw, decay=False),
    Rule("<block>.attn.attn_sink", Owner.adamw, decay=False),
    Rule("<block>.attn.compressor.ape", Owner.adamw, decay=False),
    Rule("<block>.attn.indexer.compressor.ape", Owner.adamw, decay=False),
    Rule("<block>.{hc_attn,hc_ffn}.fn", Owner.muon),
    Rule("hc_head.fn", Owner.muon),
    Rule("mtp.<n>.hc_head.fn", Owner.muon),
    Rule("<block>.attn.{wq_a,wq_b,wkv,wo_b,wq,wk,wv,wo}.weight", Owner.muon),
    Rule("<block>.attn.wo_a.weight", Owner.muon, split="o_groups"),
    Rule("<block>.attn.compressor.{wkv,wgate}.weight", Owner.muon),
    Rule("<block>.attn.indexer.{wq_b,weights_proj}.weight", Owner.muon),
    Rule("<block>.attn.indexer.compressor.{wkv,wgate}.weight", Owner.muon),
    Rule("<block>.ffn.gate.weight", Owner.muon),
    Rule("<block>.ffn.experts.{w1,w2,w3}.weight", Owner.muon, split=EXPERTS),
    Rule("<block>.ffn.shared_experts.{w1,w2,w3}.weight", Owner.muon),
    Rule("mtp.<n>.{e_proj,h_proj}.weight", Owner.muon),
)


@dataclass(frozen=True)
class ParamRecord:
    """What happens to one parameter (a row of params.csv).

    Attributes:
        name: fully qualified.
        shape: of the whole parameter, whatever the layout.
        owner: optimizer that moves it.
        split: how Muon cuts it (``whole`` under AdamW, which is elementwise).
        weight_decay: coefficient; the decay of a step is lr times it.
        num_matrices: independent matrices under Muon; 0 under AdamW.
    """

    name: str
    shape: tuple[int, ...]
    owner: Owner
    split: str
    weight_decay: float
    num_matrices: int


def build_table(
    shapes: Mapping[str, Iterable[int]],
    config: OptimConfig,
    split_counts: Mapping[str, int] | None = None,
    rules: tuple[Rule, ...] = TABLE,
) -> list[ParamRecord]:
    """Resolve every parameter against the table.

    Args:
        shapes: fully qualified name -> whole shape.
        config: the ``optim`` section.
        split_counts: size of each named split of the model, such as ``{"o_groups": 8}``.
        rules: the table.

    Returns:
        One record a parameter, in the given order.

    Raises:
        ValueError: a parameter matches no rule or several, a split does not fit its shape, or a
            pattern of ``optim.muon.splits`` matches no Muon parameter.
    """
    overrides = {_regex(pattern): pattern for pattern in config.muon.splits}
    used: set[str] = set()
    records = []
    for name, shape in shapes.items():
        rule = match_rule(name, rules)
        split = rule.split
        if rule.owner is Owner.muon:
            hits = [pattern for regex, pattern in overrides.items() if regex.fullmatch(name)]
            if len(hits) > 1:
                raise ConfigError(f"optim.muon.splits: {name} matches {len(hits)} patterns: {hits}")
            used.update(hits)
            split = config.muon.splits[hits[0]] if hits else split
        records.append(_record(name, tuple(shape), rule, split, config, split_counts or {}))
    if unused := sorted(set(config.muon.splits) - used):
        raise ConfigError(f"optim.muon.splits: {unused} match no parameter that Muon owns")
    return records


def match_rule(name: str, rules: tuple[Rule, ...] = TABLE) -> Rule:
    """The one rule of ``name``.

    Raises:
        ValueError: none, or several; the message names the parameter and the patterns.
    """
    hits = [rule for rule in rules if _regex(rule.pattern).fullmatch(name)]
    if len(hits) == 1:
        return hits[0]
    patterns = [rule.pattern for rule in (hits or rules)]
    found = f"{len(hits)} rules" if hits else "no rule"
    raise ValueError(f"optim: parameter {name} matches {found} of optim/groups.py: {patterns}")


_CACHE: dict[str, re.Pattern[str]] = {}


def _regex(pattern: str) -> re.Pattern[str]:
    if pattern not in _CACHE:
        text = re.escape(pattern).replace("<block>", r"(?:layers|mtp)\.\d+").replace("<n>", r"\d+")
        words = r"\\\{([^{}]*)\\\}"
        text = re.sub(words, lambda m: "(?:" + m.group(1).replace(",", "|") + ")", text)
        _CACHE[pattern] = re.compile(text)
    return _CACHE[pattern]


def _record(
    name: str,
    shape: tuple[int, ...],
    rule: Rule,
    split: str,
    config: OptimConfig,
    split_counts: Mapping[str, int],
) -> ParamRecord:
    owner = rule.owner if rule.owner is Owner.adamw else _owner_of_matrices(config)
    if owner is Owner.muon and split == Owner.adamw:  # a matrix that is left to AdamW
        owner = Owner.adamw
    decays = {
        Owner.muon: config.muon.weight_decay,
        Owner.adamw: config.adamw.weight_decay,
    }
    if owner not in decays:
        raise ConfigError(f"optim.name={owner.value}: optim/groups.py knows no weight decay of it")
    decay = decays[owner] if rule.decay else 0.0
    if owner is not Owner.muon:
        return ParamRecord(name, shape, owner, WHOLE, decay, 0)
    return ParamRecord(
        name, shape, owner, split, decay, _num_matrices(name, shape, split, split_counts)
    )


def _owner_of_matrices(config: OptimConfig) -> Owner:
    """The algorithm that ``optim.name`` asks for: of that name, and no other in its stead."""
    name = OptimizerName(config.name).value
    if name not in set(Owner):
        raise ConfigError(f"optim.name={name}: optim/groups.py has no owner {name}")
    return Owner(name)


def _num_matrices(
    name: str, shape: tuple[int, ...], split: str, split_counts: Mapping[str, int]
) -> int:
    needed_dims = 3 if split == EXPERTS else 2
    if len(shape) != needed_dims:
        raise ConfigError(
            f"optim: {name} has shape {shape}, but its split {split!r} takes {needed_dims} dims"
        )
    if split == WHOLE:
        return 1
    if split == EXPERTS:
        return shape[0]
    if split not in split_counts:
        known = [WHOLE, EXPERTS, *split_counts]
        raise ConfigError(f"optim.muon.splits: {name} has split {split!r}, known are {known}")
    count = split_counts[split]
    if count < 1 or shape[0] % count:
        raise ConfigError(f"optim: {name} has {shape[0]} rows, not a multiple of {split}={count}")
    return count
