"""What must hold on a GPU as on a CPU: equal runs, killed runs, checkpoints that change device.

Each body runs on the CPU too, which proves it; the variants for a GPU need one (``make gpu``).
Bounds: equality where a run is compared with itself on one device. Between devices fp32 sums in
another order: ``ACROSS`` is for a loss near 5 after three steps (a step's rounding is 1e-7
relative, Muon's update amplifies it to at most 3e-3 of a step, of which the loss sees lr * 3e-3).
"""

from dataclasses import replace

import pytest
import torch

from model.config import Kernels
from model.kernels.select import op_names
from scripts.gpu.gpu_ops import calls_of, one_of_each, run_call
from tests.helpers import small_config
from tests.integration.devices import on
from tests.integration.small_run import (
    KillAfter,
    Killed,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from tests.model.kernels.op_cases import cases, fast, reference
from tests.model.kernels.op_cases import run as run_case
from train.build import build
from train.config.schema import Device, Precision
from train.errors import ExitCode

ACROSS = 1e-3
STEPS = 4
AGAIN = {"cpu": 2, "cuda": 10}  # equal runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_on(device, folder, corpus, precision=Precision.fp32):
    return small_run(
        folder, corpus, steps=STEPS, device=Device(device), precision=precision,
        checkpoint_every=2, keep_checkpoints=0,
    )  # fmt: skip


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_equal_runs_are_bitwise_equal_and_so_is_a_killed_one(device, precision, corpus, tmp_path):
    first = run_on(device, tmp_path / "0", corpus, precision)
    assert fit(first)[0] == ExitCode.finished
    tensors, lines = final_tensors(first), metrics_of(first)
    for number in range(1, AGAIN[device]):
        again = run_on(device, tmp_path / str(number), corpus, precision)
        if number == 1:  # killed between two checkpoints, and started again
            trainer = build(again)
            trainer.recorder.trackers.append(KillAfter(3))
            with pytest.raises(Killed):
                trainer.fit()
            assert [line["step"] for line in metrics_of(again)] == [1, 2, 3]
        assert fit(again)[0] == ExitCode.finished
        assert differing(final_tensors(again), tensors) == []
        assert metrics_of(again) == lines


@pytest.mark.parametrize(
    ("first", "second"), [on("cpu", "cpu"), on("cuda", "cpu"), on("cpu", "cuda")]
)
def test_a_checkpoint_written_on_one_device_goes_on_on_another(first, second, corpus, tmp_path):
    whole = run_on(first, tmp_path / "whole", corpus)
    assert fit(whole)[0] == ExitCode.finished
    begun = run_on(first, tmp_path / "moved", corpus)
    trainer = build(begun)
    trainer.recorder.trackers.append(KillAfter(3))
    with pytest.raises(Killed):
        trainer.fit()
    moved = replace(begun, train=replace(begun.train, device=Device(second)))
    trainer = build(moved)
    assert trainer.state.progress.step == 2
    assert {p.device.type for p in trainer.engine.model.parameters()} == {second}
    loaded = {n: p.detach().cpu() for n, p in trainer.engine.model.named_parameters()}
    saved = final_tensors(moved)  # of the newest checkpoint, step 2
    assert [n for n, p in loaded.items() if not torch.equal(p, saved[f"model.{n}"])] == []
    assert trainer.fit() == ExitCode.finished
    for mine, theirs in zip(metrics_of(moved), metrics_of(whole), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=ACROSS if first != second else 0)
    if first == second:
        assert differing(final_tensors(moved), final_tensors(whole)) == []


@pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
@pytest.mark.parametrize("op", cases())
def test_every_op_on_its_device_is_its_reference(op, device):
    """Results and gradients in fp32 against the reference in float64.

    The yardstick is the reference in fp32: three times its own error and 1e-5 of the largest value
    (matmuls of 16 to 100 summands; TF32 is off).
    """
    for number, case in enumerate(cases()[op]):
        exact = run_case(case, reference, {n: t.double() for n, t in case.inputs.items()})
        plain = run_case(case, reference, case.inputs)
        with torch.device(device):
            here = cases()[op][number]
            got = run_case(here, fast, {n: t.to(device) for n, t in here.inputs.items()})
        for name, want in exact.items():
            mine = got[name].cpu()
            if not want.is_floating_point():
                assert torch.equal(mine.sort(-1).values, want.sort(-1).values), name
                continue
            bound = 3 * (plain[name].double() - want).abs().max() + 1e-5 * want.abs().max()
            assert (mine.double() - want).abs().max() <= bound + 1e-12, name


# cross_entropy overwrites its input, symmetric_product is Muon's: their own tests have them
REST = sorted(set(op_names()) - set(cases()) - {"cross_entropy", "symmetric_product"})


@pytest.fixture(scope="module", params=[on("cpu"), on("cuda")])
def calls(request):
    """Every op's inputs in a forward pass of a small model with a block of each kind."""
    config = one_of_each(small_config(num_nextn_predict_layers=0, compress_ratios=[0, 4, 8]))
    noted = calls_of(config, 2, 48, torch.device(request.param), torch.float32)
    return {call.op: call for call in noted}


@pytest.mark.parametrize("op", REST)
def test_every_other_op_on_its_device_is_its_reference(op, calls):
    """Whole numbers equal; the others, and gradients, within 1e-5 of the largest (fp32 sums)."""
    got, wanted = (run_call(calls[op], k, True) for k in (Kernels.auto, Kernels.reference))
    for mine, theirs in zip(got, wanted, strict=True):
        assert len(mine) == len(theirs)
        for x, y in zip(mine, theirs, strict=True):
            if y.is_floating_point():
                assert (x - y).abs().max() <= 1e-5 * y.abs().max() + 1e-12
            else:
                assert torch.equal(x.long(), y.long())
