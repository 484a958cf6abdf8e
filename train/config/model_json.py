"""``config.json`` of a model folder: sizes, and the casts with which the weights were trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from model.config import ModelConfig
from model.config_json import from_official
from quant.config import QuantConfig
from train.config.transformers_json import from_transformers_config, is_transformers_config
from train.errors import USER_ERRORS, UserError, one_line

CONFIG_JSON = "config.json"
QUANT_KEY = "quant"  # the casts with which the weights were trained


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
        config = (from_transformers_config if theirs else from_official)(values)
        return config, _quant(values.get(QUANT_KEY))
    except USER_ERRORS as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def quant_values(quant: QuantConfig) -> dict[str, Any]:
    """What ``config.json`` says of the casts."""
    values = {k: v for k, v in asdict(quant).items() if v is not None and k != "engine"}
    return {k: v.value if hasattr(v, "value") else v for k, v in values.items()}


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
