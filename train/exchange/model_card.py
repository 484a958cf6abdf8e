"""The model card of an exported folder (``README.md``): what the model is and how it came to be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from model.parameter_counts import parameter_counts

CARD = "README.md"
UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class Provenance:
    """How a model came to be, as far as the place that holds it knows.

    Attributes:
        run: name of the run's folder; empty: the place is no run.
        step: of the checkpoint.
        tokens: trained up to it, padding included.
        val_loss: of an evaluation after that step, nats per token.
        weights: which of the checkpoint's.
        settings: keys of the run's config that say how it trained, with their values.
        receipt: of the run's last start; empty where it has left none yet.
    """

    run: str = ""
    step: int = 0
    tokens: int = 0
    val_loss: float | None = None
    weights: str = "model"
    settings: Mapping[str, Any] = field(default_factory=dict)
    receipt: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    config: ModelConfig, layout: str, dtype: str, origin: Provenance, licence: str
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        config: sizes.
        layout: of the exported folder.
        dtype: of its tensors.
        origin: how the model came to be.
        licence: identifier for the front matter; the trainer cannot know it.
    """
    parts = [_front_matter(layout, licence), f"# {config.name}", _about(layout, dtype)]
    parts += ["## Architecture", _table(("what", "value"), _architecture(config))]
    if origin.run:
        parts += ["## Training", _table(("what", "value"), _training(origin))]
        parts += ["## Data", _data(origin.receipt)]
        parts += ["## Losses", _losses(origin)]
    parts += ["## Licence", _licence(licence)]
    return "\n\n".join(parts) + "\n"


def _front_matter(layout: str, licence: str) -> str:
    library = ["library_name: transformers"] if layout == "transformers" else []
    lines = [f"license: {licence}", *library, "pipeline_tag: text-generation"]
    return "\n".join(["---", *lines, "tags:", "- deepseek_v4", "- v4-pretrain", "---"])


def _about(layout: str, dtype: str) -> str:
    load = {
        "transformers": "`AutoModelForCausalLM.from_pretrained(folder)` reads it; MTP blocks, which"
        " it passes over, lie under their official names.",
        "official": "Tensors bear the released names; `v4 import_hf` and `v4 score` read it.",
        "quantised": "Tensors are stored as in the release: FP8 blocks, packed experts, scales.",
    }[layout]
    return (
        "A DeepSeek-V4 model, trained from scratch with v4-pretrain. It continues text; it was not"
        f" tuned to follow instructions. Layout: {layout}, {dtype}. {load}"
    )


def _architecture(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    counts = parameter_counts(config)
    kinds = [config.kind(layer).value for layer in range(config.num_hidden_layers)]
    yield "parameters", f"{counts.total:,}"
    yield "of which one token uses", f"{counts.active:,}"
    yield "layers", f"{len(kinds)} ({', '.join(kinds)})"
    yield "MTP blocks", config.num_nextn_predict_layers
    yield "hidden size", config.hidden_size
    yield "residual streams", config.hc_mult
    yield "heads, head dim", f"{config.num_attention_heads}, {config.head_dim}"
    yield (
        "routed experts, of which a token takes",
        (f"{config.n_routed_experts}, {config.num_experts_per_tok}"),
    )
    yield "vocabulary", config.vocab_size
    yield "positions", config.max_position_embeddings


def _training(origin: Provenance) -> Iterator[tuple[str, Any]]:
    receipt, code = origin.receipt, origin.receipt.get("code", {})
    yield "run", f"`{origin.run}`, step {origin.step} ({origin.weights} weights)"
    yield "tokens", f"{origin.tokens:,}, padding included"
    for key, value in origin.settings.items():
        yield f"`{key}`", value
    for what, value in (
        ("config", receipt.get("config_sha256")),
        ("code", code.get("commit")),
        ("sources of the code", code.get("source_sha256")),
    ):
        if value:
            yield what, f"`{value[:12]}`"


def _data(receipt: Mapping[str, Any]) -> str:
    data = receipt.get("data", {})
    rows = [
        (
            name,
            *(f"{content[key]:,}" if key in content else "" for key in ("documents", "tokens")),
            f"`{str(content.get('train', content.get('store', '')))[:12]}`",
        )
        for name, content in sorted((data.get("sources") or {}).items())
    ]
    if not rows:
        return "The run has left no receipt that names it."
    return _table(("source", "training documents", "tokens", "their hash"), rows)


def _losses(origin: Provenance) -> str:
    receipt = origin.receipt
    rows: list[tuple[str, Any]] = []
    if origin.val_loss is not None:
        rows.append(("validation loss of this step, nats per token", f"{origin.val_loss:.4f}"))
    if receipt.get("progress", {}).get("step") == origin.step:
        validation, last = receipt.get("validation") or {}, receipt.get("final_metrics") or {}
        for name, value in (
            ("training loss of the last step, nats per token", last.get("loss")),
            ("validation loss of the final evaluation, nats per token", validation.get("loss")),
            ("bits per byte of that text", validation.get("bits_per_byte")),
            ("bits per byte of that text by `xz -9e`", validation.get("xz_bits_per_byte")),
        ):
            if value is not None and math.isfinite(value):
                rows.append((name, f"{value:.4f}"))
    for entry in receipt.get("harness") or []:
        if entry.get("step") == origin.step:
            for task, values in sorted(entry["results"].items()):
                rows += [(f"{task}, {name}", f"{v:.4f}") for name, v in sorted(values.items())]
    return _table(("what", "value"), rows) if rows else "None was measured at this step."


def _licence(licence: str) -> str:
    if licence == UNKNOWN_LICENCE:
        return "Not stated. Weights carry the terms of the text that they were trained on as well."
    return f"`{licence}`, as stated by who exported it."


def _table(head: Sequence[str], rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)
