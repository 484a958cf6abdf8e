"""Shipped YAMLs say what the dataclasses say, and bad values name their key."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from optim.config import NewtonSchulzIterations, OptimConfig, OptimizerName, ScheduleKind

CONF = Path(__file__).resolve().parents[2] / "conf"


def load(name):
    with initialize_config_dir(str(CONF / "optim"), version_base=None):
        merged = OmegaConf.merge(OmegaConf.structured(OptimConfig), compose(name))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, OptimConfig)
    return config


def changed(**keys):
    """A config with dotted keys set."""
    config = OptimConfig()
    for key, value in keys.items():
        owner, _, last = key.rpartition("__")
        setattr(getattr(config, owner) if owner else config, last, value)
    return config


def test_muon_yaml_is_the_default_config():
    assert load("muon") == OptimConfig()
    load("muon").validate()


def test_adamw_yaml_differs_in_the_name_alone():
    assert load("adamw") == OptimConfig(name=OptimizerName.adamw)


@pytest.mark.core
def test_defaults_are_the_papers():
    config = OptimConfig()
    config.validate()
    assert (config.lr, config.schedule.warmup_steps, config.schedule.end_lr_ratio) == (
        2.7e-4,
        2000,
        0.1,
    )
    assert config.schedule.kind is ScheduleKind.cosine_tail
    assert (config.muon.momentum, config.muon.nesterov, config.muon.rms) == (0.95, True, 0.18)
    assert config.adamw.betas == [0.9, 0.95]
    assert config.adamw.eps == 1e-20
    assert config.muon.weight_decay == config.adamw.weight_decay == 0.1
    assert config.grad_clip == 1.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "sgd"}, r"optim\.name=sgd"),
        ({"lr": 0.0}, r"optim\.lr=0\.0"),
        ({"lr": float("nan")}, r"optim\.lr=nan"),
        ({"grad_clip": -1.0}, r"optim\.grad_clip=-1\.0"),
        ({"state_dtype": "fp8"}, r"optim\.state_dtype=fp8"),
        ({"schedule__kind": "step"}, r"optim\.schedule\.kind=step"),
        ({"schedule__warmup_steps": -1}, r"optim\.schedule\.warmup_steps=-1"),
        ({"schedule__end_lr_ratio": 2.0}, r"optim\.schedule\.end_lr_ratio=2\.0"),
        ({"schedule__decay_start": 90.0}, r"optim\.schedule\.decay_start=90\.0"),
        ({"schedule__decay_start_tokens": -5}, r"optim\.schedule\.decay_start_tokens=-5"),
        ({"muon__momentum": 1.0}, r"optim\.muon\.momentum=1\.0"),
        ({"muon__rms": 0.0}, r"optim\.muon\.rms=0\.0"),
        ({"muon__scale": "original", "muon__rms": 0.2}, r"optim\.muon\.scale=original .*rms=0\.2"),
        ({"muon__weight_decay": -0.1}, r"optim\.muon\.weight_decay=-0\.1"),
        ({"muon__dtype": "fp16"}, r"optim\.muon\.dtype=fp16"),
        ({"muon__newton_schulz": []}, r"optim\.muon\.newton_schulz=\[\]"),
        (
            {"muon__newton_schulz": [NewtonSchulzIterations(0, 2.0, -1.5, 0.5)]},
            r"optim\.muon\.newton_schulz\[0\]\.steps=0",
        ),
        ({"adamw__betas": [0.9]}, r"optim\.adamw\.betas=\[0\.9\]"),
        ({"adamw__betas": [0.9, 1.0]}, r"optim\.adamw\.betas\[1\]=1\.0"),
        ({"adamw__eps": 0.0}, r"optim\.adamw\.eps=0\.0"),
        ({"adamw__weight_decay": -1.0}, r"optim\.adamw\.weight_decay=-1\.0"),
    ],
)
def test_bad_value_is_refused_by_its_key(keys, message):
    with pytest.raises(ValueError, match=message):
        changed(**keys).validate()
