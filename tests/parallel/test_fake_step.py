"""A step on fake tensors exchanges, to the byte and the count, what the closed forms say.

Formulas and trace share nothing but names: sizes of one come from the config, of the other from
the tensors that travel.
"""

import json
from dataclasses import replace

import pytest

import scripts.layout_trials.exchange_forms as forms
from scripts.layout_trials.exchanges import ENDS, MUON, STREAMS, Key
from scripts.layout_trials.fake_step import as_on_cards, main, run_rank
from train.config.command_line import compose_run
from train.stages import resolve

# One layer of each kind; shards of 128 tokens, so that halos of 8 and of 128 - 1 tokens are cut
# at the row's beginning on some ranks and not on others.
SMALL = [
    "v4_tiny", "--parallel", "single", "--set", "model.num_hidden_layers=3",
    "model.layer_kinds=[swa,csa,hca]", "model.compress_ratios=[0,4,128,0]",
    "train.activation_checkpoint=block", "train.precision=bf16",
    "train.micro_batch_size=1", "optim.muon.dtype=bf16",
]  # fmt: skip
ROWS = ["train.seq_len=512", "train.global_batch_tokens=1024"]
LAYOUTS = {
    "cp2-ep2": ["parallel.dp_shard=1", "parallel.cp=2", "parallel.ep=2"],
    "cp4": ["parallel.dp_shard=1", "parallel.cp=4"],
    "cp2xdp2-ep2": ["parallel.dp_shard=2", "parallel.cp=2", "parallel.ep=2"],
    "cp2xpp2-ep2": ["parallel.dp_shard=1", "parallel.cp=2", "parallel.ep=2", "parallel.pp=2"],
}


@pytest.mark.parametrize("degrees", LAYOUTS.values(), ids=LAYOUTS)
def test_exchanges_are_those_of_the_closed_forms(degrees, tmp_path, capsys):
    file = tmp_path / "found.json"
    assert main([*SMALL, *ROWS, *degrees, "--json", str(file)]) == 0, capsys.readouterr().out
    (found,) = json.loads(file.read_text())
    rows = [row for one in found["results"] for row in one["exchanges"]]
    assert {row["layer"].partition(".")[0] for row in rows} == {"layers", "mtp", "ends"}
    whats = {row["what"].partition(",")[0].partition(" of")[0] for row in rows if row["bytes"]}
    assert {"tokens before", "entries", "parameters", "gradients", "Muon's matrices"} <= whats
    for one in found["results"]:
        memory = one["memory"]
        assert memory["parameters"] > 0 < memory["gathered weights"]
        assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


def exchanges_of(run, stage, rank, microbatches):
    """What was seen, and the closed forms; equal for every key that has an exact one."""
    watch, closed = run_rank(run, stage, rank, microbatches)
    for key in watch.seen.keys() | closed.keys():
        if key not in closed or closed[key].exact:
            seen, form = watch.seen[key], closed.get(key, forms.Expected())
            assert (seen.count, seen.bytes) == (form.count, form.bytes), (rank, key)
    return watch.seen


def composed(*words):
    run = compose_run([f"model={SMALL[0]}", f"parallel={SMALL[2]}", *SMALL[4:], *ROWS, *words])
    degrees = run.parallel
    run = as_on_cards(run, degrees.pp * degrees.dp_shard * degrees.cp)
    return run, resolve(run).stages[-1]


SHORT = [  # one layer, short rows
    "model.num_hidden_layers=1", "model.layer_kinds=[csa]", "model.compress_ratios=[4]",
    "model.num_nextn_predict_layers=0", "train.mtp_loss_weight=0", "train.seq_len=64",
    "train.mtp_loss_weight_decay=0", "train.global_batch_tokens=192",
]  # fmt: skip


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        (["parallel.dp_shard=1", "parallel.cp=4", "train.global_batch_tokens=64"], (0, 3)),
        # 3 ranks share 2 experts: w1 and w3 are cut by rows, w2 by columns
        (["parallel.dp_shard=3", "parallel.cp=2", "parallel.ep=2", "model.n_routed_experts=4",
          "model.moe_intermediate_size=24"], (0, 5)),
    ],
    ids=["cp4", "cp2xdp3-ep2"],
)  # fmt: skip
def test_muon_exchange_of_a_rank_is_that_of_its_own_matrices(degrees, ranks):
    run, stage = composed(*SHORT, *degrees)
    seen = [exchanges_of(run, stage, rank, 1)[Key(ENDS, MUON)] for rank in ranks]
    assert len({one.count for one in seen}) == 1, "every rank takes part in every round"
    assert len({one.bytes for one in seen}) > 1, "ranks own other matrices"


def test_exchanges_grow_by_as_much_with_every_microbatch():
    """From as few as a pipeline takes to as many as fill it."""
    two_layers = [
        "model.num_hidden_layers=2", "model.layer_kinds=[csa,hca]", "model.compress_ratios=[4,16]",
    ]  # fmt: skip
    run, stage = composed(*SHORT, *two_layers, *LAYOUTS["cp2xpp2-ep2"])
    few, more, many = (exchanges_of(run, stage, 1, count) for count in (2, 3, 8))
    assert few.keys() == more.keys() == many.keys()
    grown = {key.what.partition(",")[0] for key in few if more[key].count > few[key].count}
    assert {"tokens before", "entries of 32", "experts' rows", STREAMS} <= grown
    for key in few:
        for name in ("count", "bytes"):
            two, three, last = (getattr(seen[key], name) for seen in (few, more, many))
            assert last == two + 6 * (three - two), (key, name)


def test_formula_that_is_off_is_told(monkeypatch, capsys):
    real = forms._experts
    monkeypatch.setattr(
        forms, "_experts",
        lambda out, name, run, *more: real(
            out, name, replace(run, model=replace(run.model, num_experts_per_tok=3)), *more
        ),
    )  # fmt: skip
    assert main([*SMALL, *ROWS, *LAYOUTS["cp2-ep2"]]) == 1
    printed = capsys.readouterr().out
    told = [line for line in printed.splitlines() if line.startswith("| csa")]
    assert [line for line in told if " OFF" in line] == [
        line for line in told if "| experts' rows |" in line
    ]
    assert "tokens before" in printed


def test_what_the_formulas_do_not_hold_is_refused(capsys):
    degrees = ["parallel.dp_shard=1", "parallel.cp=2"]
    none = [word.replace("checkpoint=block", "checkpoint=none") for word in SMALL]
    for words, message in (
        (none, "train.activation_checkpoint=block, not none"),
        ([*SMALL, "parallel.dp_replicate=2"], "parallel.dp_replicate=1, not 2"),
        ([*SMALL, "parallel.cp_scoring=balanced"], "parallel.cp_scoring=own, not balanced"),
    ):
        assert main([*words, *ROWS, *degrees]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("model", "ranks"), [("v4_flash", 512), ("v4_pro", 2048)])
def test_preset_at_a_million_tokens_exchanges_as_the_closed_forms_say(model, ranks, capsys):
    assert main([model, "--microbatches", "4"]) == 0, capsys.readouterr().out
    assert f"{model} on {ranks} ranks" in capsys.readouterr().out
