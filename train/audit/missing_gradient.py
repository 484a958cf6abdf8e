"""Which parameters never had a gradient in a stage's audited steps, and what excuses them."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import LayerKind, ModelConfig
from train.audit.evidence import Evidence

_FEW_TOKENS = 16  # an expert that got fewer may have met none whose loss reaches it


class GradientsSeen:
    """Gradients of the audited steps of one stage, and what those steps could exercise.

    Args:
        model: its config.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._gradients: dict[str, Tensor] = {}
        self._loads: dict[str, Tensor] = {}
        self._longest = 0
        self._targets_K = [0.0] * (1 + model.num_nextn_predict_layers)

    def add(self, e: Evidence) -> None:
        """Count a step that was applied."""
        for name, norms in e.grad_norms.items():
            self._gradients[name] = self._gradients.get(name, torch.zeros_like(norms)) + norms
        for name, load_E in e.shares.expert_load.items():
            self._loads[name] = self._loads.get(name, torch.zeros_like(load_E)) + load_E
        self._longest = max(self._longest, e.longest_document)
        self._targets_K = [a + b for a, b in zip(self._targets_K, e.targets_K, strict=True)]

    def missing(self, name: str) -> tuple[str, str]:
        """What is wrong with a parameter's gradient so far, and what excuses it; empty: nothing."""
        norms = self._gradients.get(name)
        if ".ffn.experts." in name:
            load_E = self._loads[f"{name.partition('.experts.')[0]}.gate"]
            labelled_E = load_E - self._unlabelled(name, load_E)
            silent = torch.ones_like(load_E) if norms is None else (norms == 0)
            for expert in silent.nonzero().flatten().tolist():
                if labelled_E[expert] >= _FEW_TOKENS:
                    return f"had no gradient for expert {expert}, which got tokens", ""
            count = int(silent.sum())
            few = f"{count} experts got, for sure, fewer than {_FEW_TOKENS} tokens with a label"
            return ("had no gradient", few) if count else ("", "")
        if norms is not None and bool((norms > 0).any()):
            return "", ""
        least = self._least_document(name)
        if self._longest < least:
            return "had no gradient", f"no document of {least} tokens (longest {self._longest})"
        if self._weighs_one_entry(name):
            return "had no gradient", "windows of one token: there is nothing to weigh"
        return "received no gradient", ""

    def _unlabelled(self, name: str, load_E: Tensor) -> float:
        """Tokens among those of a gate that no loss is taken of: the ends of documents.

        In the trunk a token without a next one, in the MTP block of depth k one without a token
        2 + k places ahead. Nothing reads such a token, since attention is causal.
        """
        depth = 1 + int(name.split(".")[1]) if name.startswith("mtp.") else 0
        tokens = float(load_E.sum()) / self._model.num_experts_per_tok
        return tokens - self._targets_K[depth]

    def _weighs_one_entry(self, name: str) -> bool:
        """Whether a parameter weighs the tokens of a compressed entry that has but one."""
        if not name.startswith("layers.") or ".attn.compressor." not in name:
            return False
        layer, model = int(name.split(".")[1]), self._model
        alone = model.kind(layer) is LayerKind.hca and model.ratio(layer) == 1
        return alone and name.endswith((".ape", ".wgate.weight"))

    def _least_document(self, name: str) -> int:
        """Tokens that a document needs before a parameter can matter to a loss."""
        parts = name.split(".")
        if parts[0] == "mtp":
            return 3 + int(parts[1])
        if parts[0] != "layers":
            return 2
        ratio = self._model.ratio(int(parts[1]))
        if ".indexer." in name:
            return 2 * ratio + 1
        return ratio + 2 if ".compressor." in name else 2
