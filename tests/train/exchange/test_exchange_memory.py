"""Conversions as processes: bounded memory, and killed for good in the middle.

The limit is RLIMIT_DATA, which bounds what a process must hold (private writable memory) and not
what the kernel may drop again (mapped files). It is set to what the imports took, and a few shards.
That the limit bites is shown by a program that loads the whole model under it.
"""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from data.tokenizer import ByteTokenizer
from model.config import LayerKind, ModelConfig
from model.state_dict import to_official
from model.transformer import DeepSeekV4
from tests.helpers import ROOT
from tests.train.exchange.exchange_models import write_run
from train.exchange.open import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

log = logging.getLogger(__name__)
MIB = 1 << 20
SHARD = 16 * MIB
BUDGET = 8 * SHARD  # a shard twice, copies of a stack of experts, and what malloc keeps
LAYERS = 24

# What the script is called with, under the limit; the last line tells the peak beyond the imports.
PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from scripts import export_hf, import_hf
from train.exchange.open import load_model

def of_this_process(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(key + ":"))

what, budget, *arguments = sys.argv[1:]
torch.set_num_threads(1)
torch.ones(512, 512) @ torch.ones(512, 512)  # starts what starts once
before, resident = of_this_process("VmData"), of_this_process("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (before + int(budget),) * 2)
mains = {"export": export_hf.main, "import": import_hf.main}
code = mains[what](arguments) if what in mains else load_model(Path(arguments[0])) is None
print("resident beyond the imports:", of_this_process("VmHWM") - resident)
sys.exit(code)
"""


def start(what, *arguments, budget=BUDGET):
    command = [sys.executable, "-c", PROGRAM, what, budget, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def convert(what, *arguments, budget=BUDGET):
    code, out, err = finish(start(what, *arguments, budget=budget))
    assert code == 0, err[-2000:]
    log.info("%s %s: %s", what, arguments, out.splitlines()[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 115 million parameters, 0.45 GB; and its model."""
    config = ModelConfig(
        name="large", vocab_size=ByteTokenizer().vocab_size, hidden_size=256,
        num_hidden_layers=LAYERS, num_attention_heads=4, head_dim=32, qk_rope_head_dim=8,
        q_lora_rank=32, o_groups=2, o_lora_rank=32, sliding_window=8,
        layer_kinds=[LayerKind.swa] * LAYERS, compress_ratios=[0] * LAYERS, n_routed_experts=24,
        num_experts_per_tok=2, moe_intermediate_size=256, num_hash_layers=1,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    model = DeepSeekV4(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(0.0, 0.02, generator=generator)
        else:  # experts of a hash router
            tensor.random_(0, config.n_routed_experts, generator=generator)
    size = sum(t.nbytes for t in model.state_dict().values())
    assert size > 3 * BUDGET
    folder = tmp_path_factory.mktemp("large") / "run"
    write_run(folder, model)
    return folder, model


def assert_same_values(folder, model):
    again, _ = load_model(folder)
    theirs = to_official(again)
    for name, value in to_official(model).items():
        assert torch.equal(theirs[name], value), name


def words(layout):
    """Of an export whose values are the run's; the quantised layout has dtypes of its own."""
    dtype = () if layout == "quantised" else ("--dtype", "fp32")
    return ("--to", layout, "--shard-gb", SHARD / 2**30, *dtype)


def test_the_limit_is_one(run):
    code, _, err = finish(start("load", run[0]))
    assert code != 0
    assert "memory" in err


@pytest.mark.parametrize("layout", ["transformers", "official", "quantised"])
def test_export_of_a_model_larger_than_memory(layout, run, tmp_path):
    convert("export", run[0], tmp_path / "out", *words(layout))
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 4
    if layout != "quantised":
        assert_same_values(tmp_path / "out", run[1])


def test_a_folder_larger_than_memory_converts_and_comes_back(run, tmp_path):
    """Folder to folder, and folder to checkpoint."""
    convert("export", run[0], tmp_path / "a", *words("official"))
    convert("export", tmp_path / "a", tmp_path / "b", *words("quantised"))
    convert("import", tmp_path / "a", tmp_path / "back")
    assert_same_values(tmp_path / "back", run[1])
    direct = tmp_path / "direct"
    convert("export", run[0], direct, *words("quantised"))
    assert_same_tensors(tmp_path / "b", direct)


def assert_same_tensors(folder, expected):
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in (name for name in names if name.endswith(".safetensors")):
        with safe_open(folder / name, "pt") as ours, safe_open(expected / name, "pt") as theirs:
            assert set(ours.keys()) == set(theirs.keys())
            for key in theirs.keys():
                a, b = ours.get_tensor(key), theirs.get_tensor(key)
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), key


def kill_when(process, ready):
    """SIGKILL as soon as ``ready()``; false if the process was through before."""
    while process.poll() is None:
        if ready():
            process.send_signal(signal.SIGKILL)
            finish(process)
            assert process.returncode == -signal.SIGKILL
            return
        time.sleep(0.001)
    pytest.fail(f"finished before it could be killed: {finish(process)}")


@pytest.mark.parametrize("layout", ["transformers", "quantised"])
def test_a_killed_export_goes_on(layout, run, tmp_path):
    arguments = words(layout)
    convert("export", run[0], tmp_path / "whole", *arguments)
    target = tmp_path / "killed"
    for wanted in (1, 3):  # killed twice
        process = start("export", run[0], target, *arguments)
        kill_when(process, lambda w=wanted: len(list(target.glob("*.safetensors"))) >= w)
        assert not (target / "model.safetensors.index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    convert("export", run[0], target, *arguments)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same_tensors(target, tmp_path / "whole")


def test_a_killed_import_goes_on(run, tmp_path):
    """Killed while parameters are laid out, then while the checkpoint is written."""
    folder, back = tmp_path / "out", tmp_path / "back"
    convert("export", run[0], folder, *words("official"))
    process = start("import", folder, back)
    kill_when(process, lambda: len(list((back / "importing").glob("*.tensor"))) > 50)
    kept = {path: path.stat().st_mtime_ns for path in (back / "importing").glob("*.tensor")}
    process = start("import", folder, back)
    kill_when(process, lambda: any((back / "checkpoints").glob(".writing*")))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    convert("import", folder, back)
    assert_same_values(back, run[1])
    assert not (back / "importing").exists()
    assert len(list((back / "checkpoints").iterdir())) == 1
