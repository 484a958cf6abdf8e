"""Opens models: our run folders and checkpoints, ``transformers`` folders, official folders.

:func:`open_source` finds out what a path holds and gives its tensors under official names, one at a
time, so that whoever copies them never holds more than one (of a run: one stack of experts).
:func:`load_model` fills a model from it. Writing is in ``train/exchange/export.py``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.state_dict import official_items
from model.transformer import DeepSeekV4
from quant.apply import apply_quant
from quant.config import QuantConfig, Recipe
from quant.probe import QuantProbe
from train.checkpoint.files import MANIFEST
from train.config.model_json import CONFIG_JSON
from train.config.schema import Weights
from train.errors import UserError
from train.exchange.folder_source import FolderSource
from train.exchange.model_source import ModelSource
from train.exchange.run_source import RunSource
from train.run_folder.folder import CHECKPOINTS


def open_source(path: Path, weights: Weights = Weights.model) -> ModelSource:
    """Whatever model ``path`` holds.

    Args:
        path: run folder, checkpoint, ``transformers`` folder or official folder.
        weights: of a run, which of them.

    Raises:
        UserError: nothing that is known, or it is damaged or incomplete.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir():
        return RunSource(path, weights)
    if (path / CONFIG_JSON).is_file() and any(path.glob("*.safetensors")):
        if weights is not Weights.model:
            raise UserError(
                f"--weights={weights.value}: {path} is a model folder, which holds one set of"
                " weights: give a run or a checkpoint"
            )
        return FolderSource(path)
    raise UserError(
        f"{path} holds no model: neither a run ({CHECKPOINTS}/), nor a checkpoint"
        f" ({MANIFEST}), nor {CONFIG_JSON} with .safetensors files"
    )


def load_model(
    path: Path,
    device: torch.device | str = "cpu",
    recipe: Recipe | None = None,
    weights: Weights = Weights.model,
) -> tuple[DeepSeekV4, Tokenizer | None]:
    """A model and its tokenizer from any known folder.

    Args:
        path: run folder, checkpoint, ``transformers`` folder or official folder.
        device: where the model goes.
        recipe: casts of the forward pass; None: those that it was trained with, as far as known.
        weights: of a run, which of them.

    Returns:
        The model with fp32 parameters, in fp32 compute, no gradients; the tokenizer or None.

    Raises:
        ValueError: it cannot be read.
    """
    source = open_source(path, weights)
    return fill_model(source, device, recipe), source.tokenizer()


def fill_model(
    source: ModelSource, device: torch.device | str = "cpu", recipe: Recipe | None = None
) -> DeepSeekV4:
    """The model of a source that is open; see :func:`load_model`."""
    model = DeepSeekV4(source.config)
    for name, tensor in model.state_dict().items():
        fill_parameter(tensor, name, source)
    model.requires_grad_(False)
    quant = source.quant if recipe is None else QuantConfig(recipe=recipe)
    if quant is not None and quant.active:
        apply_quant(model, quant, QuantProbe(), keep_weights=True)
    return model.to(device)


@torch.no_grad()
def fill_parameter(target: Tensor, name: str, source: ModelSource) -> None:
    """Copy one of our parameters, or buffers, from a source; a gamma becomes 1 (it is folded)."""
    if name.endswith(".gamma"):
        target.fill_(1.0)
        return
    official = [n for n, _ in official_items({name: target})]
    if target.dim() == 3:
        for expert, part in enumerate(official):
            target[expert].copy_(source.read(part))
    else:
        target.copy_(source.read(official[0]))
