"""How mHC's start depends on the width, at a fixed deviation of ``fn`` and by ``hc_fn_gain``.

    python docs/studies/mhc_init/table.py      # writes README.md beside it: 10 s of a core

A token's mixes are ``fn x`` with an x of RMS 1 and S * D channels, so that they spread by the
deviation of fn times sqrt(S * D). Everything that a mapping does dynamically is proportional to
that: what a step of the gating factors moves, and their gradient beside the static bias's, which
takes the same way through the model. One forward and backward pass of ``v4_micro`` at each width
and seed, on random tokens; nothing is trained. All figures are means over connections and seeds
(root of the mean square).
"""

# Legend: B batch, T tokens, M mix channels, N tokens of the batch, V vocabulary
from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from model.config import ModelConfig
from model.hyper_connections import HyperConnection
from model.init import init_weights
from model.kernels.mhc import rms_projection
from model.transformer import DeepSeekV4
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import write_text

PAGE = Path(__file__).with_name("README.md")
WIDTHS, GAIN = (64, 128, 256, 512, 1024), 0.5
HEAD = (
    "| width | fn | spread of a mix | a writing weight moves, a step of 0.01 of its factor"
    " | gradient of the factor over the bias's |"
)
INTRODUCTION = """# mHC's start over the width

Written by `python docs/studies/mhc_init/table.py`, which says what is measured. At a fixed
deviation of `fn` everything dynamic grows with the root of the width; `model.hc_fn_gain` (deviation
= gain / sqrt(streams * width)) holds it.
"""
STEP = 0.01  # of a gating factor: one step of AdamW at this rate, and its start doubled


@dataclass(frozen=True)
class Start:
    """Of the connections of a model at its start; each a root mean square.

    Attributes:
        spread: of mixes over tokens and mix channels, before the gating factor.
        moved: of a weight that writes, by a step of ``STEP`` of its gating factor.
        gradient: of the gating factor of what is written, over that of its static bias.
    """

    spread: float
    moved: float
    gradient: float


def start(config: ModelConfig, seeds: int, tokens: int = 256) -> Start:
    """Initialise a model and look.

    Args:
        config: the model.
        seeds: models with weights of their own.
        tokens: random ones, of each model's batch.
    """
    seen = [one for seed in range(seeds) for one in _connections(config, seed, tokens)]
    spread, moved, scale, base = (
        math.sqrt(sum(x * x for x in values) / len(seen)) for values in zip(*seen, strict=True)
    )
    return Start(spread, moved, scale / base)


def _connections(
    config: ModelConfig, seed: int, tokens: int
) -> list[tuple[float, float, float, float]]:
    """Spread, moved and both gradients of each connection of one model."""
    model = DeepSeekV4(config)
    init_weights(model, seed)
    found = [m for m in model.layers.modules() if isinstance(m, HyperConnection)]
    mixes: dict[HyperConnection, Tensor] = {}

    def see(module: HyperConnection, _: Any, out: Any) -> None:
        x_BTSD = out[1].x_BTSD.detach()
        mixes[module] = rms_projection(x_BTSD, module.fn.detach(), config.rms_norm_eps)

    hooks = [module.register_forward_hook(see) for module in found]
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(config.vocab_size, (1, tokens + 1), generator=generator)
    logits_NV = model.logits(ids_BT[:, :-1]).flatten(0, 1)
    F.cross_entropy(logits_NV, ids_BT[0, 1:]).backward()
    for hook in hooks:
        hook.remove()
    return [_figures(module, mixes[module], config.hc_mult) for module in found]


@torch.no_grad()
def _figures(
    module: HyperConnection, mix_BTM: Tensor, streams: int
) -> tuple[float, float, float, float]:
    written = slice(streams, 2 * streams)
    post, by = mix_BTM[..., written], float(module.scale[1])
    moved = 2 * (((by + STEP) * post).sigmoid() - (by * post).sigmoid())
    assert module.scale.grad is not None
    assert module.base.grad is not None
    static = module.base.grad[written].square().mean().sqrt()
    return (
        float(mix_BTM.std()), float(moved.square().mean().sqrt()),
        float(module.scale.grad[1].abs()), float(static),
    )  # fmt: skip


def at_width(width: int, gain: float) -> ModelConfig:
    """``v4_micro`` of another width; gain 0 is the fixed deviation."""
    words = [f"hidden_size={width}", f"hc_fn_gain={gain}", "num_nextn_predict_layers=0"]
    return load_model_config("v4_micro", [*words, "compress_ratios=[0,0,4,16,4,16]"])


def document(widths: Sequence[int] = WIDTHS, seeds: int = 6) -> str:
    """The page: one line a width, at the fixed deviation and by the gain."""
    fixed = at_width(widths[0], 0).initializer_range
    lines = [HEAD, "| --- | --- | --- | --- | --- |"]
    for name, gain in ((f"deviation {fixed:g}", 0.0), (f"hc_fn_gain {GAIN:g}", GAIN)):
        for width in widths:
            found = start(at_width(width, gain), seeds)
            figures = f"{found.spread:.3f} | {found.moved:.5f} | {found.gradient:.2f}"
            lines.append(f"| {width} | {name} | {figures} |")
    return "\n".join([INTRODUCTION, *lines]) + "\n"


if __name__ == "__main__":
    write_text(PAGE, document())
