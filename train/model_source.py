"""What every place that holds a model has in common: its protocol, ``config.json``, the tokenizer.

Runs are read by ``train/run_source.py``, folders of safetensors by ``train/folder_source.py``;
``train/exchange.py`` chooses between them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.transformer import DeepSeekV4
from quant.config import QuantConfig
from train.errors import USER_ERRORS, UserError, one_line
from train.transformers_config import from_transformers_config, is_transformers_config

CONFIG_JSON = "config.json"
QUANT_KEY = "quant"  # of config.json: the casts with which the weights were trained


class Source(Protocol):
    """A model that lies somewhere, under official names.

    Attributes:
        config: sizes, as of the last step.
        quant: how the model was quantised while it trained; None: not at all, or not known.
        origin: changes when the content does.
        shapes: of every official tensor.
    """

    config: ModelConfig
    quant: QuantConfig | None
    origin: str
    shapes: dict[str, torch.Size]

    def read(self, name: str) -> Tensor:
        """Value of an official tensor, on the CPU; quantised ones are decoded to fp32.

        Raises:
            ValueError: it holds what no model can: NaN, Inf, an expert that does not exist.
        """
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if there is one.

        Raises:
            ValueError: there is one, and it cannot be read.
        """
        ...


def meta_model(config: ModelConfig) -> DeepSeekV4:
    """Our model without memory."""
    with torch.device("meta"):
        return DeepSeekV4(config)


def check_values(where: Path, name: str, value: Tensor, config: ModelConfig) -> None:
    """Refuse what no model can hold.

    Args:
        where: the folder, for the message.
        name: of the tensor, ours or official.
        value: of it, or of a part of it.
        config: of the model.

    Raises:
        UserError: names folder, tensor and value.
    """
    if value.is_floating_point():
        if not bool(value.isfinite().all()):
            raise UserError(f"{where}: tensor {name} holds NaN or Inf")
    elif value.numel():
        least, most = (int(v) for v in value.aminmax())
        if least < 0 or most >= config.n_routed_experts:
            wrong = least if least < 0 else most
            raise UserError(
                f"{where}: tensor {name} names expert {wrong}, but"
                f" n_routed_experts={config.n_routed_experts}"
            )


def read_config_json(path: Path) -> tuple[ModelConfig, QuantConfig | None]:
    """Sizes and casts of a model folder.

    Raises:
        UserError: the file is no JSON, lacks a key or has a value that cannot be; names the file.
    """
    try:
        values = json.loads(path.read_text("utf-8"), parse_constant=_no_number)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it holds a {type(values).__name__}")
    try:
        theirs = is_transformers_config(values)
        config = (from_transformers_config if theirs else ModelConfig.from_official)(values)
        return config, _quant(values.get(QUANT_KEY))
    except USER_ERRORS as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def quant_values(quant: QuantConfig) -> dict[str, Any]:
    """What ``config.json`` says of the casts."""
    values = {k: v for k, v in asdict(quant).items() if v is not None and k != "engine"}
    return {k: v.value if hasattr(v, "value") else v for k, v in values.items()}


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, if it has one."""
    return load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None


def _no_number(text: str) -> NoReturn:
    raise UserError(f"{text} is no JSON number")


def _quant(values: Any) -> QuantConfig | None:
    if values is None:
        return None
    try:
        quant = QuantConfig(**values)
        quant.validate()
    except (TypeError, ValueError) as error:
        raise UserError(f"{QUANT_KEY}={values!r}: {one_line(error)}") from error
    return quant
