"""What a study runs, in which order, and what it refuses; every study of conf/ composes.

Finished runs are written by ``folders.leave_run`` as the trainer writes them; losses are known
functions of the learning rate, so that the right choice is known.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from optim.groups import build_table
from scripts import study
from scripts.studies.archive import archive_of, open_archive, pack
from scripts.studies.cells import Cell, flops_per_token
from scripts.studies.config import AGAIN, load_study, study_names
from scripts.studies.protocol import Protocol
from scripts.studies.search import choose
from scripts.studies.store import FinishedRun, Store, identity_of, read_run
from tests.studies.folders import CODE, leave_run
from train.config.scaled import scaled_recipe
from train.errors import ExitCode, UserError
from train.stages import resolve

SMALL = ["steps=10", "seeds=[1,2]", "search.fraction=0.5", "evaluations=2"]


def protocol(tmp_path, name="mhc_vs_plain", *words, code=CODE):
    config = load_study(name, [*SMALL, *words])
    return Protocol(config, Store([tmp_path / "runs"], code), tmp_path / "runs")


def finish(tmp_path, plan, cell, loss, code=CODE):
    folder = tmp_path / "runs" / f"{cell.arm}_{cell.steps}_{cell.lr}_{cell.seed}"
    leave_run(folder, plan.config(cell), {cell.steps // 2: loss + 1, cell.steps: loss}, code)


def loss_at(rate, best=0.016):
    """Lowest at ``best``."""
    return 3 + math.log2(rate / best) ** 2


# ---- learning rates ------------------------------------------------------------------------------
@pytest.mark.core
def test_search_takes_a_best_rate_between_others():
    losses = {1.0: 3.0, 2.0: 2.0, 4.0: 2.5}
    assert choose([1.0, 2.0, 4.0], losses, 2.0, 3).best == 2.0
    assert choose([1.0, 2.0, 4.0], {2.0: 2.0}, 2.0, 3).missing == (1.0, 4.0)


@pytest.mark.core
@pytest.mark.parametrize(("best", "asked"), [(4.0, 8.0), (1.0, 0.5)])
def test_search_grows_at_the_edge_that_is_best(best, asked):
    losses = {rate: abs(math.log2(rate / best)) for rate in (1.0, 2.0, 4.0)}
    assert choose([1.0, 2.0, 4.0], losses, 2.0, 3).missing == (asked,)


@pytest.mark.core
def test_a_best_rate_at_the_edge_is_refused_as_an_answer():
    """The loss falls with the learning rate wherever one looks."""
    losses = {2.0**k: -float(k) for k in range(10)}
    choice = choose([1.0, 2.0, 4.0], losses, 2.0, 2)
    assert choice.best is None
    assert "the highest of 5 tried (1 to 16)" in choice.reason


def test_search_that_diverged_has_no_best_rate():
    choice = choose([1.0, 2.0, 4.0], dict.fromkeys((1.0, 2.0, 4.0), math.inf), 2.0, 2)
    assert (choice.best, choice.reason) == (None, "every run of the search diverged")


# ---- the order of runs ---------------------------------------------------------------------------
def test_runs_come_in_order_and_each_start_continues(tmp_path):
    """Search of each arm (growing to 0.032), then the seeds, then A/A; nothing is asked twice."""
    plan, titles, asked = protocol(tmp_path, "mhc_vs_plain"), [], []
    while (batch := next(plan.batches(), None)) is not None:
        titles.append(batch.title)
        for cell in batch.cells:
            asked.append((cell.arm, cell.steps, cell.lr, cell.seed))
            finish(tmp_path, plan, cell, loss_at(cell.lr))
        plan = protocol(tmp_path, "mhc_vs_plain")  # as a new start would see it
    assert len(set(asked)) == len(asked)
    assert [title for i, title in enumerate(titles) if title not in titles[:i]] == [
        "search, mhc", "search, plain", "seeds, mhc", "seeds, plain", "seeds, again",
    ]  # fmt: skip
    assert {lr for arm, _, lr, seed in asked if seed != 0} == {0.016}
    assert {seed for *_, seed in asked} == {0, 1, 2}
    assert {steps for _, steps, _, seed in asked if seed == 0} == {5}


def test_no_seeds_are_spent_on_an_arm_without_a_learning_rate(tmp_path):
    plan = protocol(tmp_path, "mhc_vs_plain", "search.extensions=0")
    for arm in ("mhc", "plain"):
        for rate in plan.study.grid(arm):
            finish(tmp_path, plan, Cell(arm, 5, rate, 0), -rate)
    plan = protocol(tmp_path, "mhc_vs_plain", "search.extensions=0")
    assert list(plan.batches()) == []
    assert "highest of 3 tried" in plan.choice("mhc").reason


def test_arms_share_data_order_and_only_a_a_has_other_weights(tmp_path):
    plan = protocol(tmp_path)
    configs = {arm: plan.config(Cell(arm, 10, 1e-3, 4)) for arm in ("mhc", "plain", AGAIN)}
    assert {run.seed for run in configs.values()} == {4}
    assert [run.init_seed_offset > 0 for run in configs.values()] == [False, False, True]
    assert configs["plain"].model.residual == "plain"
    again = replace(configs[AGAIN], init_seed_offset=0)
    assert identity_of(again) == identity_of(configs["mhc"])


def test_studies_share_the_runs_of_an_arm_that_both_have(tmp_path):
    plan = protocol(tmp_path)
    finish(tmp_path, plan, Cell("mhc", 10, 1e-3, 1), 3.0)
    other = protocol(tmp_path, "attention")
    assert other.find(Cell("hybrid", 10, 1e-3, 1)) is not None
    assert other.find(Cell("csa", 10, 1e-3, 1)) is None


def test_folders_do_not_depend_on_how_many_runs_are_left(tmp_path):
    """``-m`` puts a run under the sweep's own name; one run alone must be given the same."""
    plan = protocol(tmp_path)
    batch = next(plan.batches())
    several, one = plan.command(batch), plan.command(replace(batch, cells=batch.cells[:1]))
    assert several[0] == "-m"
    assert several[-1].endswith("/seed0'")
    sweep = several[-1].removesuffix("'") + f"/optim.lr={batch.cells[0].lr!r}'"
    assert one[-1] == sweep
    launched = plan.command(batch, ["hydra/launcher=joblib"])
    assert launched[1] == "hydra/launcher=joblib"


# ---- receipts ------------------------------------------------------------------------------------
def test_runs_of_other_code_are_not_counted_unless_asked_for(tmp_path):
    cell = Cell("mhc", 10, 1e-3, 1)
    finish(tmp_path, protocol(tmp_path), cell, 3.0, code="e" * 64)
    plan = protocol(tmp_path)
    assert plan.find(cell) is None
    assert len(plan.store.other_code) == 1
    assert protocol(tmp_path, code=None).find(cell) is not None


def test_receipt_of_another_config_is_not_believed(tmp_path):
    plan, cell = protocol(tmp_path), Cell("mhc", 10, 1e-3, 1)
    finish(tmp_path, plan, cell, 3.0)
    folder = next(path.parent for path in tmp_path.rglob("receipt.json"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 0.002"))
    with pytest.raises(UserError, match=r"receipt\.json is of the config"):
        read_run(folder)
    assert protocol(tmp_path).find(Cell("mhc", 10, 2e-3, 1)) is None


def test_unfinished_runs_do_not_count(tmp_path):
    plan, cell = protocol(tmp_path), Cell("mhc", 10, 1e-3, 1)
    finish(tmp_path, plan, cell, 3.0)
    receipt = next(tmp_path.rglob("receipt.json"))
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | {"finished": False}))
    assert protocol(tmp_path).find(cell) is None


def test_archived_runs_are_enough_to_continue(tmp_path):
    plan = protocol(tmp_path)
    rates = plan.study.grid("mhc")
    for rate in rates:
        finish(tmp_path, plan, Cell("mhc", 5, rate, 0), loss_at(rate, rates[1]))
    finish(tmp_path, plan, Cell("mhc", 10, rates[1], 1), 3.0)
    path = archive_of("mhc_vs_plain", tmp_path / "archives")
    pack(protocol(tmp_path), path)
    store = Store([tmp_path / "archives"], CODE)
    assert {run.folder.parent for run in store.runs.values()} == {path}
    again = Protocol(plan.study, store, tmp_path)
    assert again.choice("mhc").best == rates[1]
    found, archived = (p.results("mhc")[1] for p in (protocol(tmp_path), again))
    assert archived.val_loss == 3.0
    assert archived.records == found.records
    assert read_run(path / found.name).files == found.files
    recorded = open_archive(path)
    assert recorded.study == plan.study
    assert recorded.results("mhc")[1].name == found.name


def test_a_study_begun_again_on_other_code_does_not_empty_its_archive(tmp_path):
    plan, cell = protocol(tmp_path), Cell("mhc", 5, protocol(tmp_path).study.grid("mhc")[0], 0)
    finish(tmp_path, plan, cell, 3.0)
    path = archive_of("mhc_vs_plain", tmp_path / "archives")
    pack(protocol(tmp_path), path)
    pack(protocol(tmp_path, code="e" * 64), path)
    assert [run.val_loss for run in Store([path.parent], CODE).runs.values()] == [3.0]
    assert open_archive(path).recorded == {}, "but the study of today does not rest on it"


# ---- conf/study ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", study_names())
def test_study_composes_and_every_run_has_a_plan(name, tmp_path):
    config = load_study(name)
    assert len(config.seeds) >= (3 if config.transfer.along else 5)  # times the rates of a grid
    plan = Protocol(config, Store([], None), tmp_path)
    for title, cell, wanted, done in plan.plan():
        run = plan.config(cell)
        assert resolve(run).steps > 0
        assert wanted >= 3, title
        assert done == 0
    own = [arm for arm, asked in config.arms.items() if not asked.seconds_of]  # else of its length
    identities = {
        arm: identity_of(plan.config(Cell(arm, plan.steps_of(arm), 1e-3, 1))) for arm in own
    }
    assert len(set(identities.values())) == len(identities), "two arms are the same"


def test_budget_is_one_of_several():
    assert load_study("aa", ["budget=nano"]).base[0] == "model=v4_nano"


def test_constants_of_muon_are_study_parameters(tmp_path):
    plan = Protocol(load_study("newton_schulz"), Store([], None), tmp_path)
    run = {arm: plan.config(Cell(arm, 10, 1e-3, 1)) for arm in plan.study.arms}
    stages = run["classic_five"].optim.muon.newton_schulz
    assert [(s.steps, s.a, s.b, s.c) for s in stages] == [(5, 3.4445, -4.775, 2.0315)]
    assert [s.steps for s in run["eight_plus_two"].optim.muon.newton_schulz] == [8, 2]
    assert run["momentum_90"].optim.muon.momentum == 0.9
    assert run["rms_25"].optim.muon.rms == 0.25
    assert run["torch_muon_original"].optim.muon.scale == "original"
    split = run["heads_split"]
    shapes = {
        "layers.1.attn.wq_b.weight": (128, 64),
        "layers.1.attn.indexer.wq_b.weight": (512, 64),
    }
    rows = [build_table(shapes, r.optim, r.model.split_counts) for r in (split, run["rms_25"])]
    heads, index_heads = split.model.num_attention_heads, split.model.index_n_heads
    assert [[r.num_matrices for r in table] for table in rows] == [[heads, index_heads], [1, 1]]


def test_all_hash_routes_every_layer_by_hash(tmp_path):
    plan = Protocol(load_study("router"), Store([], None), tmp_path)
    model = plan.config(Cell("all_hash", 10, 1e-3, 1)).model
    assert {model.router(i).value for i in range(model.num_hidden_layers)} == {"hash"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stepps=3"], "stepps"),
        (["steps=many"], "steps"),
        (["seeds=[0,1,2]"], "search.seed=0 is among"),
        (["seeds=[1]"], "at least 2"),
        (["arms.plain.lr=[1e-3,2e-3]"], "needs 3 values"),
        (["baseline=other"], "baseline=other"),
        (["budget=gigantic"], "budget/gigantic"),
    ],
)
def test_wrong_studies_are_refused_in_one_line(words, message, capsys):
    assert study.main(["study=mhc_vs_plain", *words, "--dry-run"]) == ExitCode.user_error
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_study_names_those_there_are(capsys):
    assert study.main(["study=nonsense"]) == ExitCode.user_error
    assert "muon_vs_adamw" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_runs_nothing(tmp_path, capsys):
    words = ["study=fp4_qat", *SMALL, "--out", str(tmp_path / "runs")]
    assert study.main([*words, "--archive", str(tmp_path / "docs"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "seeds, post_training" in printed
    assert re.search(r"left: 14 runs, \d+\.\d+ M tokens, \d+\.\d+ hours in turn", printed)
    assert re.search(r"an effect of \d+\.\d+ sigmas of a pair is found with 80% power", printed)
    assert not Path(tmp_path / "runs").exists()


# ---- arms at another's cost ----------------------------------------------------------------------
def test_plain_arms_have_the_flops_of_v4_and_one_tokenizer(tmp_path):
    plan = Protocol(load_study("v4_vs_dense"), Store([], None), tmp_path)
    runs = {arm: plan.config(Cell(arm, 10, 1e-3, 1)) for arm in plan.study.arms}
    flops = {arm: flops_per_token(run) for arm, run in runs.items()}
    assert flops == pytest.approx(dict.fromkeys(flops, flops["v4"]), rel=0.002)
    assert {run.data.vocab_size for run in runs.values()} == {2048}
    assert {kind for i in range(4) if (kind := runs["dense"].model.kind(i))} == {"mha"}
    assert runs["dense_clock"].model == runs["dense"].model


def test_arms_of_the_long_study_train_for_equal_flops(tmp_path):
    plan = Protocol(load_study("attention_long"), Store([], None), tmp_path)
    per_token = {a: flops_per_token(plan.config(Cell(a, 10, 1e-3, 1))) for a in plan.study.arms}
    whole = {arm: flops * plan.steps_of(arm) for arm, flops in per_token.items()}
    for kind in ("csa", "hca", "swa", "dense"):
        assert whole[f"{kind}_flops"] == pytest.approx(whole["hybrid"], rel=0.001)
        assert plan.steps_of(kind) == plan.steps_of("hybrid")


def test_steps_of_equal_flops_follow_the_model(tmp_path):
    """A window alone is cheaper than the hybrid, and the more so the more the indexer costs."""
    steps = []
    for words in ([], ["model.index_n_heads=64"]):
        config = load_study("attention_long")
        config.base += words
        plan = Protocol(config, Store([], None), tmp_path)
        steps.append(plan.steps_of("swa_flops"))
        assert plan._search_cell("swa_flops", 1e-3).steps == round(steps[-1] / 2)
    assert 2000 < steps[0] < steps[1]


def test_an_archives_flops_are_those_of_an_arms_longest_run(tmp_path):
    """The run of a search stands first and, planted, has another batch."""
    plan = Protocol(load_study("attention_long"), Store([], None), tmp_path)
    cells = [Cell("hybrid", steps, 1e-3, 1) for steps in (50, 100)]
    short, whole = (plan.config(cell) for cell in cells)
    short.train.steps, short.train.global_batch_tokens = 50, 2 * short.train.global_batch_tokens
    whole.train.steps = 100
    ours = (FinishedRun(tmp_path, run, {}, [], {}) for run in (short, whole))
    plan.recorded = dict(zip(cells, ours, strict=True))
    assert plan._step_flops("hybrid") == flops_per_token(whole) * whole.train.global_batch_tokens


def test_wide_plain_experts_cost_what_mhc_does(tmp_path):
    plan = Protocol(load_study("mhc_equal_cost"), Store([], None), tmp_path)
    flops = {a: flops_per_token(plan.config(Cell(a, 10, 1e-3, 1))) for a in ("mhc", "plain_wide")}
    assert flops["plain_wide"] == pytest.approx(flops["mhc"], rel=0.001)


def test_points_of_the_scaling_law_are_a_quarter_of_the_familys_recipe(tmp_path):
    plan = Protocol(load_study("scaling"), Store([], None), tmp_path)
    for arm, asked in plan.study.arms.items():
        run = plan.config(Cell(arm, asked.steps, 1e-3, 1))
        recipe = scaled_recipe(run.model.scale)
        assert abs(asked.steps - recipe["steps"] / 4) <= 0.5
        assert run.train.global_batch_tokens == recipe["global_batch_tokens"]
        assert asked.lr[1] == pytest.approx(recipe["lr"], rel=0.005)


def test_an_arm_trains_for_the_time_of_another_by_the_searches_step_times(tmp_path):
    """A plain step takes 0.5 s and an mHC one 0.8: 16 steps in the time of 10."""
    plan = protocol(tmp_path, "mhc_equal_cost", "seeds=[1,2]", "sequential.looks=[]")
    seen = {}
    while (batch := next(plan.batches(), None)) is not None:
        for cell in batch.cells:
            seen.setdefault(cell.arm, set()).add(cell.steps)
            seconds = 0.8 if cell.arm == "mhc" else 0.5
            folder = tmp_path / "runs" / f"{cell.arm}_{cell.steps}_{cell.lr}_{cell.seed}"
            leave_run(folder, plan.config(cell), {cell.steps: loss_at(cell.lr)}, seconds=seconds)
        plan.store.scan()
    assert seen["plain_clock"] == {8, 16}  # the search takes half the steps
    assert seen["plain"] == seen["mhc"] == {5, 10}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("arms.plain_clock.like=''", "arms.plain_clock.seconds_of=mhc must be one of"),
        ("arms.plain_clock.seconds_of=nobody", "arms.plain_clock.seconds_of=nobody must be one"),
        ("arms.plain_clock.flops_of=mhc", "=mhc and arms.plain_clock.flops_of=mhc: one of them"),
        ("arms.plain_wide.flops_of=mhc", "arms.plain_wide.flops_of=mhc must be one of"),
        ("arms.plain_clock.steps=7", "arms.plain_clock.seconds_of=mhc must be one of"),
        ("arms.plain_wide.like=plain_wide", "arms.plain_wide.like=plain_wide must be another"),
    ],
)
def test_arms_that_cannot_be_timed_are_refused(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_study("mhc_equal_cost", [word])
