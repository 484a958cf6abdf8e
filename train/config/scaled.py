"""The recipe along the dial of ``model=v4_scaled``: rows, batch, tokens, learning rate, by rule.

The rules, each monotone in the scale:

* tokens: 20 for each parameter that one token uses, embedding tables aside (Hoffmann et al. 2022,
  of dense models), so that compute is balanced between parameters and tokens;
* rows, batch and learning rate: geometric between a small model's and V4-Flash's (DeepSeek-V4
  section 4.2.2); warm-up: a twentieth of the steps, at most the released 2,000.

Only the ends rest on a search or a paper; between them the recipe is extrapolated, and a start says
so. YAML takes the values by ``${scaled:SCALE,KEY}``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from model.config import ModelConfig
from model.flops import training_flops
from model.parameter_counts import parameter_counts
from model.scaled import LARGEST, between, power_between, scaled_shape

TOKENS_PER_PARAMETER = 20
_ROWS = (16, 18432)  # of a step; V4-Flash's 75.5 M tokens are 18432 rows of 4096
_SEQ_LEN = (256, 4096)
_MICRO = (16, 1)
_LR = (1.6e-2, 2.7e-4)  # Muon's: of the smallest shape the better of two (docs/LOG.md); V4-Flash's
_WARMUP = 2000
_EVAL_TOKENS = (16_384, 8_388_608)


@dataclass(frozen=True)
class ScaledCost:
    """What a place on the dial costs.

    Attributes:
        parameters: of everything, MTP included.
        active: that one token uses, embedding tables included.
        flops_per_token: of training, forward and backward.
        tokens: of the run.
        steps: of the optimizer.
    """

    parameters: int
    active: int
    flops_per_token: float
    tokens: int
    steps: int

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_token * self.tokens


@functools.cache
def scaled_recipe(scale: int) -> dict[str, Any]:
    """Values of ``train``, ``optim`` and ``data`` at a scale, by the names that the YAML asks for.

    Raises:
        ConfigError: the scale is outside the family.
    """
    model = ModelConfig(scale=scale, **scaled_shape(scale))
    seq_len, micro = power_between(scale, *_SEQ_LEN), power_between(scale, *_MICRO)
    rows = 16 * round(between(scale, *_ROWS) / 16)
    batch = rows * seq_len
    wanted = TOKENS_PER_PARAMETER * parameter_counts(model).active_without_embedding
    steps = max(1, round(wanted / batch))
    return {
        "seq_len": seq_len,
        "global_batch_tokens": batch,
        "micro_batch_size": micro,
        "steps": steps,
        "every": max(1, steps // 10),
        "eval_tokens": seq_len * round(between(scale, *_EVAL_TOKENS) / seq_len),
        "lr": float(f"{between(scale, *_LR):.3g}"),
        "warmup_steps": max(1, min(_WARMUP, steps // 20)),
        "tokenizer": "deepseek-v4" if scale == LARGEST else "bpe",
    }


def scaled_cost(scale: int) -> ScaledCost:
    """Parameters, FLOPs and tokens at a scale, in closed form.

    Raises:
        ConfigError: the scale is outside the family.
    """
    model, recipe = ModelConfig(scale=scale, **scaled_shape(scale)), scaled_recipe(scale)
    counts = parameter_counts(model)
    flops = training_flops(model, recipe["seq_len"]).total
    tokens = recipe["steps"] * recipe["global_batch_tokens"]
    return ScaledCost(counts.total, counts.active, flops, tokens, recipe["steps"])


def scaled_line(scale: int) -> str:
    """What the banner does not say of such a run."""
    return (
        f"model.scale={scale}: where nothing else is given, its batch, tokens and learning rate are"
        " extrapolated by the rule of the family"
    )


def _value(scale: int, key: str) -> Any:
    found = scaled_shape(scale).get(key)
    return scaled_recipe(scale)[key] if found is None else found


OmegaConf.register_new_resolver("scaled", _value, replace=True)
