"""``model.kernels``: which implementation runs where, and what cannot run here is refused."""

import pytest
import torch

from model.config import Kernels
from model.errors import ConfigError
from model.kernels import cpu_build, select
from model.kernels.select import active_kernels, check_kernels, op_names
from tests.helpers import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_choices_by_device(monkeypatch):
    ops = set(op_names())
    monkeypatch.setattr(cpu_build, "compiler", lambda: "g++")
    monkeypatch.setattr(select, "triton_installed", lambda: True)
    plain = {
        "grouped_linear", "block_linear", "route", "expert_order", "load_and_balance", "send",
        "collect", "pool_entries", "cross_entropy", "symmetric_product",
    }  # fmt: skip
    on_cpu = dict.fromkeys(ops, "compiled") | dict.fromkeys(plain, "torch")
    for kernels in (Kernels.auto, Kernels.fast):
        assert active_kernels(kernels, CPU) == on_cpu
        assert active_kernels(kernels, CUDA) == dict.fromkeys(ops, "triton")
    assert active_kernels(Kernels.reference, CUDA) == dict.fromkeys(ops, "reference")
    assert active_kernels(Kernels.torch, CPU) == dict.fromkeys(ops, "torch")
    monkeypatch.setattr(select, "triton_installed", lambda: False)
    monkeypatch.setattr(cpu_build, "compiler", lambda: None)
    assert active_kernels(Kernels.auto, CUDA) == dict.fromkeys(ops, "torch")
    assert active_kernels(Kernels.auto, CPU) == dict.fromkeys(ops, "torch")


@pytest.mark.parametrize(
    ("kernels", "device", "without", "told"),
    [
        (Kernels.compiled, "cuda", None, "for a CPU, not train.device=cuda"),
        (Kernels.compiled, "cpu", "compiler", "needs g\\+\\+"),
        (Kernels.triton, "cuda", "triton_installed", "pip install"),
        (Kernels.triton, "cpu", "interprets", "TRITON_INTERPRET=1"),
    ],
)
def test_what_cannot_run_is_refused(kernels, device, without, told, monkeypatch):
    if without:
        where = cpu_build if without == "compiler" else select
        monkeypatch.setattr(where, without, lambda: None)
    with pytest.raises(ConfigError, match=told):
        check_kernels(tiny_config(kernels=kernels), device)


def test_compiled_refuses_head_dims_that_it_would_leave_to_torch():
    with pytest.raises(ConfigError, match=r"model\.head_dim=24"):
        check_kernels(tiny_config(kernels=Kernels.compiled, head_dim=24), "cpu")


def test_choices_without_a_condition_pass_everywhere():
    for kernels in (Kernels.auto, Kernels.fast, Kernels.reference, Kernels.torch):
        for device in ("cpu", "cuda"):
            check_kernels(tiny_config(kernels=kernels), device)
