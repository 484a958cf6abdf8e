"""Reads what DeepSpeed's own ``save_checkpoint`` wrote under ZeRO 1 to 3, as a model folder.

DeepSpeed's converter puts the flat pieces together; the names may be ours, official or those of
``transformers``. Everything else is checked by whoever reads the folder. The files are pickles:
read only checkpoints from people you would run code from.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.state_dict import official_items
from parallel.deepspeed_load import load_deepspeed
from train.config.model_json import CONFIG_JSON, read_config_json
from train.errors import UserError, one_line
from train.exchange.model_source import meta_model

_PREFIXES = ("", "module.", "model.", "module.model.")  # of a module that wraps ours


def write_folder(checkpoint: Path, config: Path, target: Path) -> None:
    """Write ``config.json`` and one safetensors file. The model is in memory once, in fp32.

    Args:
        checkpoint: what ``save_checkpoint`` was given; its ``latest`` says which step.
        config: the model's ``config.json``, official or of ``transformers``.
        target: an empty folder.

    Raises:
        UserError: it is no such checkpoint, or cannot be read.
    """
    load_deepspeed(torch.device("cpu"))
    from deepspeed.utils.zero_to_fp32 import (  # noqa: PLC0415  an extra
        get_fp32_state_dict_from_zero_checkpoint,
    )

    if not (checkpoint / "latest").is_file():
        raise UserError(f"{checkpoint} is no folder of DeepSpeed's save_checkpoint: no file latest")
    try:
        state: Any = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    except Exception as error:  # whatever unpickling and its asserts raise
        raise UserError(f"{checkpoint} cannot be read: {one_line(error)}") from error
    shutil.copyfile(config, target / CONFIG_JSON)
    named = _official(state, config)
    save_file({name: t.contiguous() for name, t in named.items()}, target / "model.safetensors")


def _official(state: dict[str, Tensor], config: Path) -> dict[str, Tensor]:
    """Our names made official; others as they are."""
    ours = meta_model(read_config_json(config)[0]).state_dict()
    found = dict(state)
    for prefix in _PREFIXES:
        if all(f"{prefix}{name}" in state for name in ours):
            own = {name: state[f"{prefix}{name}"] for name in ours}
            found = {name: tensor.clone() for name, tensor in official_items(own)}
            break
    # DeepSpeed's converter makes floats of buffers, tables of experts too.
    return {n: t.long() if n.endswith("tid2eid") else t for n, t in found.items()}
