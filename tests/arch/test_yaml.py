"""Every YAML of conf/ composes with the defaults and gives a valid run with a plan."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from tests.helpers import ROOT
from train.config.command_line import CONF, compose_run, groups, options
from train.stages import check_contexts, check_rows, resolve

CHOICES = [(group, option) for group in groups() for option in options(group)]


@pytest.mark.core
def test_defaults_compose_to_the_small_model():
    run = compose_run()
    assert (run.model.name, run.run_dir) == ("v4_nano", "runs/v4_nano")
    assert resolve(run).steps == run.train.steps


def missing_paths(group: str, option: str) -> list[str]:
    """Paths that only the user can give."""
    content = yaml.safe_load((CONF / group / f"{option}.yaml").read_text()) or {}
    sources = content.get("sources", {}) if group == "data" else {}
    return [
        f"data.sources.{name}.path=somewhere"
        for name, source in sources.items()
        if source.get("path") == "???"
    ]


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda v: v)
def test_option_composes_and_has_a_plan(group, option):
    family = ["model=v4_scaled"] if (group, option) == ("train", "v4_scaled") else []
    run = compose_run([f"{group}={option}", *family, *missing_paths(group, option)])
    plan = resolve(run)
    assert plan.steps > 0
    if group == "model":
        assert run.model.name == option
    if group == "train":
        assert run.train.steps == plan.steps or run.train.stages


def test_every_folder_of_conf_is_a_group_that_is_asked_for():
    folders = {path.name for path in Path(CONF).iterdir() if path.is_dir()}
    assert folders - {"study"} == set(groups())


def test_every_model_size_has_a_recipe_of_its_own():
    """``train`` is optional in the defaults list, so a missing file would pass unnoticed."""
    assert options("train") == options("model")


def test_model_files_hold_plain_model_keys():
    for option in options("model"):
        text = (CONF / "model" / f"{option}.yaml").read_text()
        assert "@package" not in text
        assert OmegaConf.create(text)["name"] == option


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro"])
def test_paper_presets_cut_their_long_rows_over_the_ranks_they_are_for(name):
    """The preset's layout runs every stage; one of few ranks says which it cannot."""
    run = compose_run([f"model={name}", f"parallel={name}"])
    plan, layout = resolve(run), run.parallel
    check_contexts(plan, run, layout)
    check_rows(plan, layout.data_degree)
    first = next(stage for stage in plan.stages if stage.cp > 1)
    match = rf"\({first.name}\) needs cp={first.cp} .*dp_shard=1 \* parallel.cp=1 ranks"
    with pytest.raises(ValueError, match=match) as caught:
        check_contexts(plan, run, replace(layout, dp_shard=1))
    steps = int(str(caught.value.args[0]).rpartition("=")[2])  # the first stage's line
    assert plan.tokens_at(steps) >= first.start_tokens
    run.train.steps = steps
    check_contexts(resolve(run), run, replace(layout, dp_shard=1))


@pytest.mark.parametrize("name", ["v4_tiny", "v4_micro", "v4_nano", "v4_mini", "v4_small"])
def test_small_sizes_make_every_part_matter(name):
    """Selection leaves entries out, and a row holds several HCA blocks (issue: the model)."""
    run = compose_run([f"model={name}"])
    model, seq_len = run.model, run.train.seq_len
    assert model.index_topk <= seq_len / 16
    assert 8 * max(model.ratios) <= seq_len
    assert model.sliding_window <= seq_len / 4
    assert {model.kind(i).value for i in range(model.num_hidden_layers)} == {"swa", "csa", "hca"}
    assert model.num_hash_layers >= 1
    assert model.num_nextn_predict_layers >= 1
    assert model.index_n_heads >= 16


def test_extras_hold_what_they_say_and_none_moves_torch():
    """Triton alone, Transformer Engine for CUDA 13 alone; only the core names torch, exactly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: list(map(Requirement, of)) for name, of in
              project["optional-dependencies"].items()}  # fmt: skip
    core = {r.name: r for r in map(Requirement, project["dependencies"])}
    assert re.fullmatch(r"==\d+\.\d+\.\d+", str(core["torch"].specifier))
    assert "torch" not in {r.name for some in extras.values() for r in some}
    (triton,) = extras["triton"]
    assert (triton.name, str(triton.specifier)) == ("triton", "==3.7.1")
    assert str(next(r for r in extras["dev"] if r.name == "triton")) == str(triton)
    (te,) = extras["te"]
    assert (te.name, te.extras) == ("transformer-engine", {"pytorch", "core_cu13"})
    guide = (ROOT / "docs" / "guide" / "one_gpu.md").read_text()
    build = 'NVTE_FRAMEWORK=pytorch MAX_JOBS=4 pip install --no-build-isolation -e ".[te]"'
    assert build in guide
    assert build in (ROOT / "pyproject.toml").read_text()
