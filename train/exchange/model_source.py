"""What every place that holds a model has in common.

Runs are read by ``run_source.py``, folders of safetensors by ``folder_source.py``; ``open.py``
chooses between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.transformer import DeepSeekV4
from quant.config import QuantConfig
from train.errors import UserError
from train.exchange.model_card import Provenance


class ModelSource(Protocol):
    """A model that lies somewhere, under official names.

    Attributes:
        config: sizes, as of the last step.
        quant: how the model was quantised while it trained; None: not at all, or not known.
        origin: changes when the content does.
        shapes: of every official tensor.
        provenance: how the model came to be, as far as the place knows.
    """

    config: ModelConfig
    quant: QuantConfig | None
    origin: str
    shapes: dict[str, torch.Size]
    provenance: Provenance

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
