"""Read one model size from ``conf/model`` for the scripts that need no whole run config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.config import ModelConfig
from train.errors import ROOT, UserError

FOLDER = ROOT / "conf" / "model"


def load_model_config(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """Build the configuration of a model size.

    Args:
        name: file name in ``conf/model`` without its ending, or the path of another YAML.
        overrides: ``key=value`` pairs, as on the trainer's command line without ``model.``.

    Raises:
        ValueError: no such file, an unknown key, or values that cannot be.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserError(f"model={name} is neither a file nor one of {known}")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(ModelConfig),
            OmegaConf.load(path),
            OmegaConf.from_dotlist(list(overrides)),
        )
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    config.validate()
    return config
