"""Any value at any key gives a run or one line that names the key; never another exception.

Only what needs no file is asked: composing, ranges, checks across sections, the plan, the fit.
"""

import copy
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config.command_line import compose_run
from train.config.load import dump, parse
from train.config.schema import RunConfig
from train.errors import USER_ERRORS
from train.preflight.checks import check_run
from train.preflight.precision import Measure

Path = tuple[str | int, ...]

BASES = (
    ["model=v4_tiny"],
    [
        "model=v4_tiny", "quant=deployed", "optim.schedule.warmup_steps=1",
        "train.stages=[{name: a, until_tokens: 2048, ramp_from_tokens: 128, ramp_tokens: 512},"
        "{until_tokens: 4096, seq_len: 64, lr: 1e-3, indexer_phase: warmup}]",
        "data.sources.a.kind=text", "data.sources.a.path=x", "data.sources.a.weight=0.25",
        "data.sources.b.kind=jsonl", "data.sources.b.path=y", "data.sources.b.weight=0.75",
        "train.recovery.on_spike=rollback", "train.checkpoint_every=2", "train.eval_every=2",
        "train.keep_best_checkpoints=1", "optim=muon_heads", "train.micro_batch_size=1",
    ],
)  # fmt: skip
EQUAL: Measure = lambda run: {"fp32": 1.0, "bf16": 1.0}  # noqa: E731  no time for matmuls
CONFIGS = [yaml.safe_load(dump(compose_run(base))) for base in BASES]


def paths(tree: Any, path: Path = ()) -> list[Path]:
    """Every node below the root: sections, lists and their items, values."""
    found = [path] if path else []
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    return found + [p for key, item in items for p in paths(item, (*path, key))]


NODES = [(index, path) for index, tree in enumerate(CONFIGS) for path in paths(tree)]
numbers = st.one_of(
    st.sampled_from([
        0, -1, 1, 2, 3, 7, 0.5, 1.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
        -float("inf"), 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40,
    ]),
    st.integers(-10, 10**6), st.floats(),
)  # fmt: skip
strings = st.one_of(
    st.sampled_from([
        "", " ", "x", "1", "true", "nan", "null", "???", "${seed}", "${nowhere}", "${", "$",
        "a\nb", "\x00", "/", "..", "\u043a\u043b\u044e\u0447", "\U0001f600", "a" * 5000, "none",
    ]),
    st.text(max_size=8),
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), numbers, strings)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=2),
    max_leaves=4,
)


def mutated(index: int, path: Path, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIGS[index])
    node: Any = config
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return config


def check(node: tuple[int, Path], value: Any) -> None:
    index, path = node
    try:
        config = OmegaConf.create(mutated(index, path, value))
    except OmegaConfBaseException:  # "${": pretrain.py tells these in one line
        return
    try:
        run, _ = check_run(parse(config), EQUAL, files=False)
    except USER_ERRORS as error:
        told = str(error)
        assert "\n" not in told
        assert len(told) < 1000 * told.count(";") + 1000
        assert any(str(part) in told for part in path if isinstance(part, str)), told
    else:
        assert isinstance(run, RunConfig)


def test_unchanged_configs_are_right():
    for config in CONFIGS:
        run, _ = check_run(parse(OmegaConf.create(config)), EQUAL, files=False)
        assert isinstance(run, RunConfig)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@example(node=(0, ("run_dir",)), value={"a" * 5000: "${nowhere}"})
@example(node=(0, ("run_dir",)), value={"a" * 5000: "???"})
@example(node=(0, ("run_dir",)), value={"a\nb": "???"})
@given(node=st.sampled_from(NODES), value=values)
def test_any_value_at_any_key_is_a_run_or_one_line(node, value):
    check(node, value)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, deadline=None, database=None)
@given(node=st.sampled_from(NODES), value=values)
def test_any_value_at_any_key_is_a_run_or_one_line_many_times(node, value):
    check(node, value)
