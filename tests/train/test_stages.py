"""The plan against a step-by-step simulation, and what each stage trains."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from model.config import Attention, IndexerPhase, LayerKind, ModelConfig
from parallel.config import CpScoring, ParallelConfig
from train.config.schema import StageConfig, TrainConfig
from train.stages import check_contexts, check_rows, loss_weights, resolve, trains

pytestmark = pytest.mark.core


def make_run(train: TrainConfig, **model) -> SimpleNamespace:
    kinds = ["swa", "csa", "hca"]
    config = ModelConfig(
        num_hidden_layers=3, compress_ratios=[0, 4, 16, 0], layer_kinds=kinds, **model
    )
    return SimpleNamespace(train=train, model=config, parallel=ParallelConfig())


def simulate(stages: list[StageConfig], until: int) -> list[tuple[int, int]]:
    """(position, batch) of every step, by the definition of the ramp in exact fractions."""
    out, tokens, start = [], 0, 0
    for s in stages:
        full = s.global_batch_tokens
        sizes = [full]
        if s.ramp_from_tokens:
            quantum = max(
                q for q in range(1, full + 1) if full % q == 0 and s.ramp_from_tokens % q == 0
            )
            sizes = list(range(s.ramp_from_tokens, full + 1, quantum))
        while tokens < min(s.until_tokens, until):
            done = tokens - start
            batch = full
            if s.ramp_from_tokens and done < s.ramp_tokens:
                # the largest size that the straight line has reached
                batch = max(
                    size
                    for size in sizes
                    if (size - s.ramp_from_tokens) * s.ramp_tokens
                    <= (full - s.ramp_from_tokens) * done
                )
            out.append((tokens, batch))
            tokens += batch
        start = s.until_tokens
    return out


STAGES = [
    StageConfig(
        name="ramp", until_tokens=1000, seq_len=4, global_batch_tokens=56,
        ramp_from_tokens=8, ramp_tokens=530, indexer_phase=IndexerPhase.full,
    ),
    StageConfig(
        name="warm", until_tokens=1100, seq_len=8, global_batch_tokens=24, lr=1e-3,
        indexer_phase=IndexerPhase.warmup,
    ),
    StageConfig(
        name="long", until_tokens=3000, seq_len=16, global_batch_tokens=96,
        ramp_from_tokens=32, ramp_tokens=777, mtp_loss_weight=0.05,
    ),
]  # fmt: skip


def test_plan_equals_a_simulation_of_every_step():
    plan = resolve(make_run(TrainConfig(steps=0, stages=STAGES)))
    steps = simulate(STAGES, 10**9)
    assert plan.steps == len(steps)
    assert plan.end_tokens == sum(steps[-1])
    assert plan.total_tokens == 3000
    for number, (tokens, batch) in enumerate(steps):
        assert plan.batch_tokens(tokens) == batch
        assert plan.step_at(tokens) == number
        assert plan.tokens_at(number) == tokens
    assert {plan.stage(t).name for t, _ in steps} == {"ramp", "warm", "long"}


def test_steps_end_a_staged_run_early_and_keep_its_horizon():
    plan = resolve(make_run(TrainConfig(steps=20, stages=STAGES)))
    steps = simulate(STAGES, 10**9)
    assert (plan.steps, plan.end_tokens, plan.total_tokens) == (20, steps[20][0], 3000)
    assert [s.name for s in plan.reached()] == ["ramp"]


def test_run_without_stages_has_one_made_from_the_train_keys():
    train = TrainConfig(steps=7, seq_len=32, global_batch_tokens=128, micro_batch_size=2)
    plan = resolve(make_run(train))
    assert (plan.steps, plan.total_tokens) == (7, 7 * 128)
    (stage,) = plan.stages
    assert (stage.seq_len, stage.micro_batch_size, stage.indexer_phase) == (32, 2, "sparse")


def test_paper_sized_plan_is_counted_at_once():
    stages = [
        StageConfig(
            until_tokens=32 * 10**12, seq_len=4096, global_batch_tokens=18432 * 4096,
            ramp_from_tokens=3072 * 4096, ramp_tokens=469 * 10**9,
        )
    ]  # fmt: skip
    plan = resolve(make_run(TrainConfig(steps=0, stages=stages)))
    assert 424_000 < plan.steps < 440_000


@pytest.mark.parametrize(
    ("phase", "decaying", "expected"),
    [
        ("full", False, (0.3, 0.0, 1e-4, 6e-3)),
        ("warmup", False, (0.0, 1e-2, 0.0, 0.0)),
        ("sparse", False, (0.3, 1e-2, 1e-4, 6e-3)),
        ("sparse", True, (0.1, 1e-2, 1e-4, 0.0)),
    ],
)
def test_loss_weights_follow_phase_and_decay(phase, decaying, expected):
    train = TrainConfig(indexer_phase=IndexerPhase(phase), bias_stops_at_decay=True)
    stage = resolve(make_run(train)).stages[0]
    w = loss_weights(stage, train, decaying)
    assert (w.mtp, w.indexer, w.balance, w.bias_update_speed) == expected


@pytest.mark.parametrize(
    ("steps", "speed"), [(20, 0.05), (120, 0.05), (300, 0.02), (6000, 1e-3), (430_000, 1e-3)]
)
def test_speed_of_the_bias_follows_the_horizon_unless_given(steps, speed):
    """6 over the steps of the whole plan, between 0.05 and the paper's 1e-3."""
    batch = 128

    def speeds(**own):
        train = TrainConfig(seq_len=32, global_batch_tokens=batch, micro_batch_size=2, **own)
        return [s.bias_update_speed for s in resolve(make_run(train)).stages]

    assert speeds(steps=steps) == [speed]
    assert speeds(steps=steps, bias_update_speed=0.25) == [0.25]
    halves = [
        StageConfig(name="one", until_tokens=batch * steps // 2),
        StageConfig(name="two", until_tokens=batch * steps, bias_update_speed=0.125),
    ]
    assert speeds(steps=0, stages=halves) == speeds(steps=7, stages=halves) == [speed, 0.125]


def test_stage_values_win_over_the_train_section():
    train = TrainConfig(steps=0, stages=STAGES)
    stage = resolve(make_run(train)).stages[2]
    assert loss_weights(stage, train, decaying=True).mtp == 0.05


@pytest.mark.parametrize(
    ("phase", "trained"),
    [
        ("full", {"embed.weight", "layers.1.attn.wq_a.weight", "mtp.0.h_proj.weight"}),
        ("warmup", {"layers.1.attn.indexer.wq_b.weight"}),
        (
            "sparse",
            {
                "embed.weight",
                "layers.1.attn.wq_a.weight",
                "layers.1.attn.indexer.wq_b.weight",
                "mtp.0.h_proj.weight",
            },
        ),
    ],
)
def test_phase_decides_what_trains(phase, trained):
    names = {
        "embed.weight",
        "layers.1.attn.wq_a.weight",
        "layers.1.attn.indexer.wq_b.weight",
        "mtp.0.h_proj.weight",
    }
    train = TrainConfig(indexer_phase=IndexerPhase(phase))
    stage = resolve(make_run(train)).stages[0]
    weights = loss_weights(stage, train, decaying=False)
    assert {n for n in names if trains(n, stage, weights)} == trained


def test_weights_of_zero_freeze_what_only_they_would_train():
    train = TrainConfig(indexer_loss_weight=0.0, mtp_loss_weight=0.0, mtp_loss_weight_decay=0.0)
    stage = resolve(make_run(train)).stages[0]
    weights = loss_weights(stage, train, decaying=False)
    assert not trains("layers.1.attn.indexer.wq_b.weight", stage, weights)
    assert not trains("mtp.0.h_proj.weight", stage, weights)
    assert trains("embed.weight", stage, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"until_tokens": 0}, "until_tokens=0"),
        ({"seq_len": 5}, "global_batch_tokens=96 must be a multiple of seq_len=5"),
        ({"ramp_from_tokens": 96}, "ramp_from_tokens=96"),
        ({"ramp_tokens": 0}, "ramp_tokens=0 and ramp_from_tokens=32"),
        ({"seq_len": 2**21, "global_batch_tokens": 2**22}, "max_position_embeddings=1048576"),
        ({"ramp_tokens": 3000}, "ramp_tokens=3000 must be below the stage's 3000 tokens"),
    ],
)
def test_impossible_stage_names_itself_and_both_values(change, message):
    values = {
        "name": "long", "until_tokens": 3000, "seq_len": 16, "global_batch_tokens": 96,
        "ramp_from_tokens": 32, "ramp_tokens": 777,
    }  # fmt: skip
    if "seq_len" in change and "global_batch_tokens" in change:
        values |= {"ramp_from_tokens": 0, "ramp_tokens": 0}
    with pytest.raises(ValueError, match=message) as caught:
        resolve(make_run(TrainConfig(stages=[StageConfig(**(values | change))])))
    assert str(caught.value).startswith("train.stages[0] (long): ")


def test_stage_that_cannot_run_is_refused_when_reached_only():
    stages = [*STAGES, StageConfig(name="1m", until_tokens=9000, cp=8)]
    stages[3].seq_len, stages[3].global_batch_tokens = 64, 64
    before = len(simulate(STAGES, 10**9))
    train = TrainConfig(steps=0, stages=stages)
    run, layout = make_run(train), ParallelConfig(dp_shard=4)
    with pytest.raises(ValueError, match=rf"\(1m\) needs cp=8 .* train.steps={before}$"):
        check_contexts(resolve(run), run, layout)
    check_contexts(resolve(run), run, replace(layout, cp=2))
    train.steps = before
    check_contexts(resolve(run), run, layout)


def test_layer_that_needs_whole_rows_is_refused_with_shards():
    run = make_run(TrainConfig(stages=[StageConfig(name="1m", until_tokens=8192, cp=2)], steps=0))
    run.model.layer_kinds = [LayerKind.swa, LayerKind.mha, LayerKind.hca]
    with pytest.raises(ValueError, match=r"\(1m\) needs cp=2 .* layer 1 .* is mha: .* whole rows"):
        check_contexts(resolve(run), run, ParallelConfig(dp_shard=1, cp=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": Attention.hca}, "shares out the indexer's work, .* no layer of kind csa"),
        ({"seq_len": 126}, "seq_len=126 must be a multiple of 2 \\* cp=4 under"),
        ({"phase": "full"}, "whose indexer chooses .* there is cp=2 indexer_phase=full"),
    ],
)
def test_balanced_scoring_that_nothing_would_follow_is_refused(change, message):
    stage = StageConfig(until_tokens=8064, cp=2, seq_len=change.get("seq_len", 128))
    stage.indexer_phase = IndexerPhase(change.get("phase", "sparse"))
    stage.global_batch_tokens = 8 * stage.seq_len
    run = make_run(TrainConfig(stages=[stage], steps=0))
    resolve(run)
    run.parallel.cp_scoring = CpScoring.balanced
    run.model.attention = change.get("attention", run.model.attention)
    with pytest.raises(ValueError, match=message):
        resolve(run)


@pytest.mark.parametrize("phase", ["full", "warmup"])
def test_atomic_sums_that_no_stage_would_make_are_refused(phase):
    stage = StageConfig(until_tokens=8192, seq_len=128, global_batch_tokens=1024)
    run = make_run(TrainConfig(stages=[stage], steps=0))
    run.model.deterministic = False
    resolve(run)
    stage.indexer_phase = IndexerPhase(phase)
    with pytest.raises(ValueError, match=f"there is indexer_phase={phase}: say model.determ"):
        resolve(run)


def test_stage_that_a_step_jumps_over_is_refused():
    stages = [*STAGES, StageConfig(name="tiny", until_tokens=3001, seq_len=8)]
    stages[3].global_batch_tokens = 8
    with pytest.raises(ValueError, match=r"\(tiny\): no step begins in it"):
        resolve(make_run(TrainConfig(steps=0, stages=[*stages, StageConfig(until_tokens=9000000)])))


def test_indexer_warmup_needs_an_indexer_and_its_loss():
    train = TrainConfig(indexer_phase=IndexerPhase.warmup)
    with pytest.raises(ValueError, match=r"needs a csa layer.*model.attention=dense"):
        resolve(make_run(train, attention="dense"))
    train.indexer_loss_weight = 0.0
    with pytest.raises(ValueError, match=r"trains nothing with train.indexer_loss_weight=0.0"):
        resolve(make_run(train))


def test_batches_must_split_over_ranks_and_microbatches():
    train = TrainConfig(steps=2, seq_len=16, global_batch_tokens=128, micro_batch_size=4)
    plan = resolve(make_run(train))
    check_rows(plan, data_degree=2)
    with pytest.raises(
        ValueError, match=r"a batch of 8 rows .*=4 times 4 data rank\(s\); 2 would do"
    ):
        check_rows(plan, data_degree=4)
    with pytest.raises(ValueError, match=r"=4 times 3 data rank\(s\)$"):
        check_rows(plan, data_degree=3)
