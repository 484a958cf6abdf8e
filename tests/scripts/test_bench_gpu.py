"""``bench gpu`` tried on a CPU: its three parts run, and what it writes says that no GPU did.

The counting of launches is held by a trace that was written by hand; the real one comes from CUDA.
"""

import json
import subprocess

import pytest
import torch

from model.config import Kernels
from model.kernels.select import op_names
from scripts.gpu.gpu import FOR_TESTS, main, runtime_calls
from scripts.gpu.gpu_ops import calls_of, measured, one_of_each
from scripts.gpu.traffic import bytes_of
from tests.helpers import ROOT, tiny_config
from train.preflight.cards import Card

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
SMALL = [
    "--device", "cpu", "--models", "v4_tiny", "--tokens", "64", "--rows", "2", "--steps", "6",
    "--seconds", "0.01", "--bandwidth-bytes", "1000000",
]  # fmt: skip


@NO_GPU
def test_without_a_gpu_one_line_and_exit_code_2(capsys):
    for words in ([], ["--check"]):
        assert main(words) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: bench gpu needs a GPU")
        assert told.err.count("\n") == 1


def test_make_gpu_asks_first_then_tests_then_measures():
    # Under `make test` this is a make within a make, which would say where it enters and leaves.
    dry = subprocess.run(
        ["make", "-n", "--no-print-directory", "gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    asks, tests, measures = dry[-3:]
    assert asks.endswith("scripts/bench.py gpu --check")
    assert tests.startswith("TRITON_INTERPRET=0 ")
    assert '-m "gpu or multigpu"' in tests
    assert measures.rstrip().endswith("scripts/bench.py gpu")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_with_its_peer(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert main([*SMALL, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    check_parts(document)
    found = document["peers"]["v4_tiny"]
    assert {"ours_lm", "hf"} == set(found)
    assert found["ours_lm"]["loss"] == pytest.approx(found["hf"]["loss"], abs=1e-4)
    text = out.with_suffix(".md").read_text()
    assert text.startswith(f"# {FOR_TESTS}\n")
    assert text in capsys.readouterr().out
    assert "| v4_tiny | hf |" in text
    assert "not counted" in text


def check_parts(document):
    assert document["environment"]["device"] == FOR_TESTS
    rates = document["rates"]
    assert min(rates[key] for key in ("bf16_tflops", "fp32_tflops", "bandwidth_gb")) > 0
    for op in document["ops"]:
        for name in ("ours", "plain", "roofline"):
            assert op[name]["forward_seconds"] > 0
            assert op[name]["with_backward_seconds"] > 0
    step = document["steps"]["v4_tiny"]
    assert step["steps"] == 1
    assert step["tokens_per_second"] > 0
    assert step["mfu"] > 0
    assert step["peak_memory_bytes"] > 0
    assert step["predicted_bytes"] > 1.2e9
    assert step["launches"] is step["synchronisations"] is None


def test_calls_have_the_bytes_and_flops_of_their_shapes():
    config = one_of_each(tiny_config(kernels=Kernels.torch))
    calls = {c.op: c for c in calls_of(config, 1, 32, torch.device("cpu"), torch.float32)}
    assert set(op_names()) - set(calls) <= {"rope", "symmetric_product"}  # fused; Muon's
    merge = calls["mhc_merge"]
    one = Card("x", 1, 1e-3, 1e-3, 1.0)  # 1e9 FLOPs a second, 1e9 bytes a second
    found = measured(merge, config, 1, 32, one, 0.0)
    streams, width = config.hc_mult, config.hidden_size
    tokens, floats = 32, streams * width * 2 + width + streams + streams**2
    assert found["roofline"]["bytes"][0] == 4 * tokens * floats
    assert found["roofline"]["flops"][0] == 2.0 * tokens * streams * width * (1 + streams)
    wide = calls["grouped_linear"]
    assert bytes_of(wide.tensors, []) > 0
    work = measured(wide, config, 1, 32, one, 0.0)["roofline"]["flops"]
    rows = tokens * config.num_experts_per_tok
    assert work[0] == 2.0 * rows * config.moe_intermediate_size * width
    assert work[1] == 2 * work[0]


def test_launches_and_synchronisations_are_counted_from_a_trace():
    def event(name, cat="cuda_runtime"):
        return {"name": name, "cat": cat, "ph": "X"}

    trace = {
        "traceEvents": [
            *[event("cudaLaunchKernel")] * 3, event("cuLaunchKernelEx", "cuda_driver"),
            event("cudaStreamSynchronize"), event("cudaMemcpyAsync"),
            event("aten::add", "cpu_op"), event("cudaLaunchKernel", "kernel"), {"ph": "M"},
            event("hipLaunchKernel", "hip_runtime"), event("cudaDeviceSynchronize"),
        ]
    }  # fmt: skip
    assert runtime_calls(trace) == {"launches": 5, "synchronisations": 2}
