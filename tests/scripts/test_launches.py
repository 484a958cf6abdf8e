"""The launch budget of a block, counted on meta tensors, and that nothing plain runs in it."""

from dataclasses import replace

import pytest

from model.config import Kernels
from scripts.benchmarks.launches import (
    BACKWARD,
    CHUNK,
    FORWARD,
    PLAIN_CHUNK,
    block_pass,
    kinds,
    main,
    plain_chunk,
)
from scripts.cli.model_yaml import load_model_config

PLAIN = (
    "model/kernels/attention_fast.py", "model/kernels/attention.py:attention_reference",
    "model/kernels/mhc_torch.py", "model/kernels/mhc.py:", "model/kernels/pool.py",
    "model/kernels/routing.py", "model/kernels/gather.py", "model/kernels/elementwise.py",
    "model/kernels/indexer.py", "model/rope.py:apply_rope", "model/linear.py:grouped",
    "model/linear.py:block_linear_loop",
)  # fmt: skip


def totals(config, layer, tokens, **more):
    one = block_pass(config, layer, tokens, **more)
    return one, sum(one.forward.values()), sum(one.backward.values())


@pytest.mark.parametrize("name", ["v4_small", "v4_flash"])
def test_every_kind_of_block_keeps_the_budget_whatever_the_length(name):
    config = replace(load_model_config(name), kernels=Kernels.triton)
    for layer in kinds(config).values():
        one, forward, backward = totals(config, layer, 4096)
        assert forward <= FORWARD, one.name
        assert backward <= BACKWARD, one.name
        found = [f for f in one.functions if f.startswith(PLAIN)]
        assert not found, one.name
        _, *packed = totals(config, layer, 2048, rows=2, documents=5)
        assert packed[0] <= FORWARD, one.name
        assert packed[1] <= BACKWARD, one.name


def test_longer_rows_add_chunks_of_fixed_bytes_only():
    config = replace(load_model_config("v4_flash"), kernels=Kernels.triton)
    for layer in kinds(config).values():
        _, forward, backward = totals(config, layer, 4096)
        one, more_forward, more_backward = totals(config, layer, 16384)
        # indexer: 16,384 x 4,096 ranks of 8 bytes in chunks of 256 MiB; pairs of 512 channels, and
        # of 128, in chunks of 512 MiB
        chunks = {"csa": (1, 39)}.get(one.name.split(",")[0], (0, 0))
        assert more_forward - forward <= CHUNK * chunks[0], one.name
        assert more_backward - backward <= CHUNK * chunks[1], one.name


def test_the_plain_path_is_seen():
    config = replace(load_model_config("v4_small"), kernels=Kernels.torch)
    one, forward, _ = totals(config, 0, 256)
    assert forward > 2 * FORWARD
    assert any(f.startswith(PLAIN) for f in one.functions)


def test_a_chunk_of_the_plain_path_is_few_launches():
    config = load_model_config("v4_small")
    layers = {name.split(",")[0]: (name, layer) for name, layer in kinds(config).items()}
    for name, layer in layers.values():  # one of each attention
        loops = plain_chunk(config, layer)
        assert ("indexer_loss_chunked" in loops) == name.startswith("csa")
        for loop, launches in loops.items():
            assert 5 < launches <= PLAIN_CHUNK, (name, loop)


def test_the_command_writes_its_table(tmp_path, capsys):
    table = tmp_path / "launches.md"
    words = ["--model", "v4_small", "--tokens", "4096", "--no-plain", "--markdown", str(table)]
    assert main(words) == 0
    assert "| csa, learned | 4,096 |" in table.read_text()
    assert "v4::triton_attention | attention_forward" in capsys.readouterr().out
