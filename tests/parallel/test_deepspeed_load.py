"""DeepSpeed that is absent or another, that does not do as told, and locks of a killed compiler."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from parallel.deepspeed_engine import DeepSpeedError, _initialised
from parallel.deepspeed_load import build_under_lock, load_deepspeed
from parallel.errors import ConfigError

CPU = torch.device("cpu")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'v4-pretrain\[deepspeed\]'"):
        load_deepspeed(CPU)


@pytest.mark.parametrize(
    ("release", "device", "line"),
    [
        ("0.17.1+abc", "cpu", r"deepspeed==0.19.8, found 0.17.1: pip install deepspeed==0.19.8"),
        ("0.19.8", "cuda", r"DS_ACCELERATOR=cuda, but train.device is cpu"),
    ],
)
def test_another_release_or_device_is_refused(monkeypatch, release, device, line):
    """Releases before the pinned one ran no Newton-Schulz at stage 0 or under zero.Init."""
    accelerator = SimpleNamespace(device_name=lambda: device)
    other = SimpleNamespace(__version__=release, get_accelerator=lambda: accelerator)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: other)
    monkeypatch.setitem(sys.modules, "deepspeed", other)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # so that what is set is undone
    with pytest.raises(ConfigError, match=line):
        load_deepspeed(CPU)


def test_stage_that_is_not_the_one_asked_for_is_named():
    runs = SimpleNamespace(zero_optimization_stage=lambda: 1)
    release = SimpleNamespace(initialize=lambda **_: [runs])
    with pytest.raises(DeepSpeedError, match="ZeRO 1 runs, 2 was asked for"):
        _initialised(release, None, None, {"zero_optimization": {"stage": 2}})


def test_configuration_that_deepspeed_refuses_is_told_in_one_line():
    class OwnError(Exception):
        """As its DeepSpeedConfigError, which is no ValueError."""

    def initialize(**given):
        raise given["config"]("field\n  wrong")

    deepspeed = SimpleNamespace(initialize=initialize, DeepSpeedConfigError=OwnError)
    for error in (ValueError, OwnError):
        with pytest.raises(ConfigError, match="DeepSpeed refuses its configuration: field wrong"):
            _initialised(deepspeed, None, None, error)


def test_lock_of_a_killed_build_of_ours_is_removed(tmp_path, caplog):
    """torch would wait for it without end."""

    def killed():
        (tmp_path / "lock").touch()  # as torch does, which removes it at the end of its build
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_under_lock(tmp_path, killed)
    seen = []
    build_under_lock(tmp_path, lambda: seen.append((tmp_path / "lock").exists()))
    assert seen == [False]
    assert f"removed {tmp_path / 'lock'}" in caplog.text
    assert not (tmp_path / "v4_builds").exists()


def test_lock_of_somebody_else_is_named(tmp_path):
    (tmp_path / "lock").touch()
    with pytest.raises(ConfigError, match=r"lock belongs to a build outside of this run"):
        build_under_lock(tmp_path, lambda: None)
    assert (tmp_path / "lock").exists()
