"""DeepSpeed that is absent, and locks that a killed compiler has left."""

import importlib.util

import pytest
import torch

from parallel.deepspeed_load import build_under_lock, load_deepspeed
from parallel.errors import ConfigError

CPU = torch.device("cpu")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'v4-pretrain\[deepspeed\]'"):
        load_deepspeed(CPU)


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
