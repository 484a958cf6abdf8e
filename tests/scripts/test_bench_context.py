"""The table of ``v4 bench context``: a share that does not fall as 1 / cp is told by the exit code.

What a process counts is tested beside ``scripts/benchmarks/live_bytes.py``; here it is given.
"""

import json

import pytest

from scripts.benchmarks import context
from scripts.cli.model_yaml import load_model_config


@pytest.mark.parametrize(("off", "code"), [(1.0, 0), (1.14, 0), (1.16, 1), (0.84, 1)])
def test_share_of_every_length_is_held(off, code, monkeypatch, tmp_path, capsys):
    def measure(cp, tokens, args):
        rest = round(1000 * tokens / cp * (off if (cp, tokens) == (4, 512) else 1.0))
        return {"tokens": tokens, "cp": cp, "bytes": rest + 5, "entry_bytes": 5, "rest": rest,
                "resident": rest, "seconds": 1.0, "loss": 1.0, "grad_norm": 1.0}  # fmt: skip

    monkeypatch.setattr(context, "measure", measure)
    file = tmp_path / "found.json"
    words = ["--tokens", "256", "512", "--cp", "1", "2", "4", "--json", str(file)]
    assert context.main(words) == code
    found = json.loads(file.read_text())["found"]
    assert [(one["tokens"], one["cp"]) for one in found] == [
        (tokens, cp) for tokens in (256, 512) for cp in (1, 2, 4)
    ]
    assert [one["share"] for one in found] == pytest.approx([1, 1, 1, 1, 1, off], rel=1e-3)
    assert "512   4" in capsys.readouterr().out


def test_entries_that_a_rank_holds_are_those_of_whole_rows():
    """fp32: CSA's entries and keys of a 4th of the tokens, HCA's of a 128th, whatever cp is."""
    config = load_model_config("v4_tiny")
    csa = 4 * (config.head_dim + config.index_head_dim) / 4
    hca = 4 * config.head_dim / config.ratio(config.layer_kinds.index("hca"))
    kinds = [config.kind(i).value for i in range(config.num_hidden_layers)]
    every = 1024 * (kinds.count("csa") * csa + kinds.count("hca") * hca)
    assert context.entry_bytes(config, 1024, "none") == every
    assert context.entry_bytes(config, 1024, "block") == 1024 * csa


def test_row_that_shards_do_not_divide_is_refused(capsys):
    assert context.main(["--tokens", "256", "130", "--cp", "4"]) == 2
    assert "--tokens 130 must be a multiple of --cp 4" in capsys.readouterr().err
