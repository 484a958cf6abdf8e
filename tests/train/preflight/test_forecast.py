"""What a run says before it starts: figures beside their oracle, and lines at any width.

FLOPs of a run are held against the sum over its single steps, planned one after the other. They are
sums of integers times a float in another order: equal to 1e-9.
"""

import logging
import re

import pytest

from data.epochs import most_epochs, planned_uses, uses
from model.flops import training_flops
from model.parameter_counts import parameter_counts
from parallel.config import ParallelConfig
from tests.helpers import ROOT
from train.config.command_line import compose_run, options
from train.preflight.banner import MOST_LINES, announce, banner
from train.preflight.forecast import duration, quantity, run_flops
from train.preflight.needs import Needs
from train.preflight.pace import DAY, Pace, long_run
from train.preflight.reach import MOST_EPOCHS, data_warnings
from train.stages import resolve
from train.step import plan_step

pytestmark = pytest.mark.core
STAGES = (
    "train.stages=[{name: a, until_tokens: 5120, ramp_from_tokens: 128, ramp_tokens: 1024},"
    "{name: b, until_tokens: 10240, seq_len: 256, indexer_phase: full},"
    "{name: c, until_tokens: 12288, indexer_phase: warmup, lr: 1e-3}]"
)


@pytest.mark.parametrize("words", [["train.steps=7"], [STAGES, "train.steps=0"], [STAGES]])
@pytest.mark.parametrize("start", [0, 3])
def test_flops_of_a_run_are_those_of_its_steps(words, start):
    run = compose_run(["model=v4_tiny", *words])
    plan, tokens, total, begun = resolve(run), 0, 0.0, 0
    for number in range(1, plan.steps + 1):
        step = plan_step(number, tokens, plan, run.train, run.optim)
        stage = step.stage
        cost = training_flops(
            run.model, stage.seq_len, stage.indexer_phase.value, step.weights.indexer > 0,
            mtp=step.weights.mtp > 0,
        )  # fmt: skip
        if number > start:
            total += step.batch_tokens * cost.total
        tokens += step.batch_tokens
        begun = tokens if number == start else begun
    assert run_flops(run, plan, begun) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("model", options("model"))
def test_banner_has_room_at_any_width(model):
    run = compose_run([f"model={model}", "train.precision=bf16", "run_dir=runs/of_mine"])
    plan = resolve(run)
    needs, counts = Needs(run, plan), parameter_counts(run.model)
    tokens = {"books": 12_345, "web_pages_of_a_crawl": 10**13, "stream": None}
    weights = {"books": 0.3, "web_pages_of_a_crawl": 0.3, "stream": 0.4}
    found = planned_uses(tokens, weights, plan.end_tokens)
    for layout in (ParallelConfig().resolve(1), ParallelConfig(1, 128, 64, 4)):
        memory = needs.peak(layout, "cpu")
        for width in (60, 80, 200, None):
            lines = banner(run, plan, found, memory, layout, "cpu", width)
            assert len(lines) <= MOST_LINES
            assert max(map(len, lines)) <= (width or 1000)
            text = "\n".join(lines)
            for told in (
                counts.total,
                counts.active,
                plan.end_tokens,
                run_flops(run, plan),
                12_345,
            ):
                assert quantity(told) in text, text
            assert f"{plan.steps:,} steps" in text
            assert "runs/of_mine" in text
        assert len(lines) == 5  # in a log nothing is left out
        assert all(use.name in text for use in found)


def test_only_rank_0_tells(caplog, monkeypatch):
    run = compose_run(["model=v4_tiny", "train.precision=fp32"])
    found = planned_uses({"a": 10}, {}, 100)
    with caplog.at_level(logging.INFO):
        announce(run, resolve(run), found, "cpu")
        told = len(caplog.records)
        for name, value in {"RANK": "1", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        announce(run, resolve(run), found, "cpu")
    assert told == 5 + 1  # banner, epochs
    assert len(caplog.records) == told


@pytest.mark.parametrize(
    ("tokens", "weights", "read", "epochs"),
    [
        ({"a": 100}, {}, 250, {"a": 2.5}),
        ({"a": 100, "b": 300}, {}, 200, {"all": 0.5}),
        ({"a": 100, "b": 300}, {"a": 0.5, "b": 0.5}, 1200, {"a": 6.0, "b": 2.0}),
        ({"a": 100, "s": None}, {"a": 0.5, "s": 0.5}, 200, {"a": 1.0, "s": None}),
        ({"s": None}, {}, 200, {"s": None}),
    ],
)
def test_epochs_are_reads_over_tokens(tokens, weights, read, epochs):
    found = planned_uses(tokens, weights, read)
    assert {use.name: use.epochs for use in found} == epochs
    known = [e for e in epochs.values() if e is not None]
    assert most_epochs(found) == (max(known) if known else None)
    assert len(list(data_warnings(found))) == sum(e > MOST_EPOCHS for e in known)
    shared = dict.fromkeys(tokens, read / len(tokens))
    done = {use.name: use.read for use in found} if weights else shared
    assert [u.epochs for u in uses(tokens, weights, done)] == pytest.approx(list(epochs.values()))


PRESETS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("gpu_*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_gpu_presets_tell_tokens_and_passes_of_real_data(preset):
    """None passes over its text more than once; all that is known of a stream stands there."""
    run = compose_run([f"experiment={preset}"])
    plan, sources = resolve(run), run.data.sources
    weights = {n: s.weight for n, s in sources.items() if s.weight is not None}
    stated = {name: source.stated_tokens for name, source in sources.items()}
    found = planned_uses(dict.fromkeys(sources), weights, plan.end_tokens, stated)
    assert all(use.foretold_epochs is None or use.foretold_epochs < 1 for use in found)
    layout = run.parallel.resolve(1)
    memory = Needs(run, plan).peak(layout, "cuda")
    text = "\n".join(banner(run, plan, found, memory, layout, "cuda"))
    assert f"{quantity(plan.end_tokens)} tokens" in text
    assert "fineweb_edu: a stream of 10" in text
    assert re.search(r"as its publisher says, 0\.\d+ epochs", text)
    assert ("codeparrot: a stream, " in text) == ("codeparrot" in sources)
    (line,) = data_warnings(planned_uses({"s": None}, {}, 50, {"s": 10}))
    assert line.startswith("5.0 epochs: the run reads the 10.0 training tokens of s")


@pytest.mark.parametrize("preset", ["gpu_8gb", "gpu_24gb"])
def test_presets_with_too_little_text_say_so(preset):
    run = compose_run([f"experiment={preset}"])
    embedded = 3_000_000  # tokens, about, of the docstrings that every installation holds
    (line,) = data_warnings(planned_uses({"embedded": embedded}, {}, resolve(run).end_tokens))
    assert re.match(r"[\d,.]+ epochs: .* embedded .* give more text", line)


@pytest.mark.parametrize(("seconds", "steps", "warned"), [(0.5, 20, 0), (7200.0, 40, 1)])
def test_expected_time_is_told_once_after_the_third_step(seconds, steps, warned, caplog):
    run = compose_run(["model=v4_tiny", f"train.steps={steps}"])
    plan, now = resolve(run), [100.0]
    pace = Pace(run, plan, lambda: now[0])
    told = []
    with caplog.at_level(logging.INFO):
        for step in range(5, steps + 1):  # a start that resumes behind step 4
            now[0] += 60 * seconds if step == 5 else seconds  # the first step warms up
            told.append(pace.step_done(step, plan.tokens_at(step)))
    lines = [line for line in told if line]
    assert [bool(line) for line in told].index(True) == 2
    left = steps - 7
    assert lines == [
        f"expected: {duration(left * seconds)} for the {left} steps left, at {seconds:.3g} s a step"
    ]
    assert sum(r.levelno == logging.WARNING for r in caplog.records) == warned
    if warned:
        a_day = 7 + int(DAY / seconds)
        assert f"train.steps={a_day}" in caplog.records[-1].getMessage()


def test_expected_time_is_told_by_stage_and_again_in_each():
    run = compose_run(["model=v4_tiny", STAGES, "train.steps=0"])
    plan, now = resolve(run), [0.0]
    pace, told, pause = Pace(run, plan, lambda: now[0]), {}, {"a": 2.0, "b": 6.0, "c": 1.0}
    for step in range(1, plan.steps + 1):
        stage = plan.stage(plan.tokens_at(step - 1))
        now[0] += pause[stage.name]
        if line := pace.step_done(step, plan.tokens_at(step)):
            told[stage.name] = (step, line)
    ends = [plan.step_at(stage.until_tokens) for stage in plan.stages]
    assert [step for step, _ in told.values()] == [3, ends[0] + 3, ends[1] + 3]
    assert [re.findall(r"\b([abc]) \d", line) for _, line in told.values()] == [
        ["a", "b", "c"], ["b", "c"], [],
    ]  # fmt: skip
    # what is left of b costs as measured, c in proportion of its FLOPs
    left = (ends[1] - told["b"][0]) * pause["b"]
    assert f"; by stage: b {duration(left)}, c " in told["b"][1]
    left = (ends[2] - told["c"][0]) * pause["c"]
    assert told["c"][1].startswith(f"expected: {duration(left)} for the ")


def test_a_run_of_more_than_a_day_is_told_before_its_first_step():
    run = compose_run(["model=v4_small"])
    plan = resolve(run)
    a_day = run_flops(run, plan) / DAY
    assert list(long_run(run, plan, 1.01 * a_day)) == []
    (line,) = long_run(run, plan, a_day / 100)
    assert "take 100.0 days" in line


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0201, "0.0201"), (7, "7.00"), (999, "999"), (999.6, "1.00 k"), (1234, "1.23 k"),
     (290_942_289_362, "291 G"), (3.15e24, "3.15 Y")],
)  # fmt: skip
def test_quantities_have_three_digits(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (600, "10 min"), (7200, "2.0 h"), (864000, "10.0 days"), (1e9, "32 years")],
)
def test_durations_are_as_one_says_them(seconds, text):
    assert duration(seconds) == text
