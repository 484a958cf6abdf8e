"""``train.compile`` on two ranks: blocks are graphs inside what FSDP gathers and reduces.

``aot_eager`` traces forward and backward pass and runs the same operations, ``eager`` the forward
pass: weights, states and losses have the bits of the run without graphs.
"""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from model.config import Kernels
from parallel.compiled_blocks import CompiledBlocks
from parallel.config import ParallelConfig
from tests.helpers import run_distributed, small_config
from tests.integration.small_run import differing, final_tensors, small_run, write_corpus
from train.build import build
from train.config.schema import ActivationCheckpoint, Precision, SampleConfig

CSA = {"num_hidden_layers": 1, "layer_kinds": ["csa"], "compress_ratios": [4, 0]}
SHARDS, COPIES = ParallelConfig(dp_shard=2), ParallelConfig(dp_replicate=2, dp_shard=1)
BLOCK = ActivationCheckpoint.block


def run_of(folder, corpus, compiled, layout=SHARDS, **train):
    given = {"eval_every": 0, "checkpoint_every": 0, "monitor_every": 50, "micro_batch_size": 1,
             **train}  # fmt: skip
    run = small_run(folder, corpus, compile=compiled, **given)
    model = small_config(vocab_size=260, kernels=Kernels.reference, **CSA)
    return replace(run, model=model, parallel=layout, sample=SampleConfig(tokens=0))


def fit_on_ranks(rank, world, run, backend):
    os.environ["WORLD_SIZE"] = str(world)
    torch._dynamo.reset()
    with patch("train.build.CompiledBlocks", partial(CompiledBlocks, backend)):
        assert build(run).fit() == 0


def pair_on_ranks(rank, world, plain, graphs, backend):
    for run in (plain, graphs):
        fit_on_ranks(rank, world, run, backend)


def receipt_of(run):
    return json.loads((Path(run.run_dir) / "receipt.json").read_text())["audit"]


CASES = {
    "shards": ("aot_eager", 3, {}),
    "copies": ("eager", 1, {"layout": COPIES}),
    "bf16": ("eager", 1, {"precision": Precision.bf16, "activation_checkpoint": BLOCK}),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_graphs_on_two_ranks_keep_the_bits_of_operations(tmp_path, case):
    backend, steps, more = CASES[case]
    corpus = write_corpus(tmp_path)
    plain = run_of(tmp_path / "plain", corpus, False, steps=steps, **more)
    graphs = run_of(tmp_path / "graphs", corpus, True, steps=steps, **more)
    run_distributed(pair_on_ranks, 2, plain, graphs, backend)
    assert differing(final_tensors(graphs), final_tensors(plain)) == []
    told = receipt_of(graphs)
    assert told["compiled"]["backend"] == backend
    assert told["compiled"]["blocks"] == 2  # MTP's is the second
    assert told["compiled"]["graphs"] > 0
    assert told["steps"] == list(range(1, steps + 1))
    assert "compiled" not in receipt_of(plain)
