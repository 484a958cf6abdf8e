"""From DictConfig to RunConfig: unknown keys, wrong types, values that cannot be together."""

import re
from dataclasses import fields, is_dataclass

import pytest
from omegaconf import OmegaConf

from parallel.config import EngineName, OffloadTo
from train.config.command_line import compose_run, groups, normalise, options
from train.config.flat import flat_config, pairs
from train.config.load import describe, dump, load
from train.config.schema import RunConfig
from train.config.values import unknown_key
from train.errors import UserError

pytestmark = pytest.mark.core


def base() -> dict:
    return {"model": {"layer_kinds": ["swa", "swa", "csa", "hca", "csa", "hca"]}}


def load_with(**changes) -> RunConfig:
    merged = OmegaConf.merge(OmegaConf.create(base()), OmegaConf.create(changes))
    return load(merged)


def test_result_is_made_of_real_sections():
    run = compose_run()
    assert type(run) is RunConfig
    for f in fields(run):
        value = getattr(run, f.name)
        assert not OmegaConf.is_config(value), f.name
        assert is_dataclass(value) or isinstance(value, str | int | bool), f.name


def test_dump_and_load_give_the_same_run():
    run = compose_run(["model=v4_flash", "train.ema_decay=0.5", "parallel.pp=2"])
    assert load(OmegaConf.create(dump(run))) == run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foo": 1}, r"unknown config key foo=1: the config has run_dir, "),
        ({"train": {"stepz": 3}}, r"unknown config key train.stepz=3: did you mean train.steps\?"),
        (
            {"optim": {"muon": {"momentun": 0.9}}},
            r"momentun=0.9: did you mean optim.muon.momentum\?",
        ),
        ({"train": {"stages": [{"until": 5}]}}, r"train.stages\[0\].until=5"),
        ({"data": {"sources": {"a": {"pathh": "x"}}}}, r"data.sources.a.pathh=x: did you mean"),
        ({"train": {"steps": "many"}}, r"train.steps=many must be a whole number"),
        ({"train": {"precision": "fp8"}}, r"train.precision=fp8 must be one of auto, fp32, bf16"),
        ({"seed": None}, r"seed=null must be a whole number"),
        ({"train": {"stages": 3}}, r"train.stages"),
        ({"model": {"hidden_size": "???"}}, r"model.hidden_size"),
        ({"model": {"hidden_size": "${nowhere}"}}, r"nowhere"),
    ],
)
def test_bad_keys_and_types_name_the_key_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_with(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "seq_len", 0),
        ("train", "global_batch_tokens", -1),
        ("train", "micro_batch_size", 0),
        ("train", "steps", 0),
        ("train", "ema_decay", 1.0),
        ("train", "eval_every", -1),
        ("train", "mtp_loss_weight", -0.1),
        ("sample", "tokens", -1),
        ("sample", "temperature", -1.0),
        ("parallel", "pp", 0),
        ("parallel", "cp", 0),
        ("parallel", "ep", -1),
        ("parallel", "schedule", "gpipe"),
        ("parallel", "schedule", "1f2b"),
    ],
)
def test_impossible_value_is_named_with_its_key(section, key, value):
    with pytest.raises(ValueError, match=rf"{section}\.{key}={value}"):
        load_with(**{section: {key: value}})


def test_engine_of_an_older_record_is_the_one_of_its_name():
    assert load_with(engine="torch") == load_with()
    assert load_with(engine="torch").engine.name is EngineName.torch
    assert [pair for pair in pairs({"engine": "torch"}, flat_config(load_with()))
            if pair[0].startswith("engine") and pair[1] != pair[2]] == []  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.pp=2"], "parallel.pp=2 does not go with engine.name=deepspeed"),
        (["parallel.ep=2"], "parallel.ep=2 does not go with engine.name=deepspeed"),
        (["train.stages=[{until_tokens: 99999, cp: 2}]"], "train.stages[0].cp=2 does not go with"),
        (["parallel.dp_replicate=2"], "parallel.dp_replicate=2 does not go with"),
        (["optim.state_dtype=bf16"], "optim.state_dtype=bf16 does not go with"),
        (["engine.zero_stage=3", "train.ema_decay=0.9"], "say engine.zero_stage=2"),
        (["train.recovery.anticipatory=always"], "train.recovery.anticipatory=always is not built"),
        (["engine.offload_parameters=cpu"], "engine.offload_parameters=cpu needs"),
        (["engine.offload_optimizer=nvme"], "engine.offload_optimizer=nvme needs"),
        (["parallel.offload=optimizer"], "say engine=torch, or engine=deepspeed_zero2_offload"),
        (["engine.nvme_path=x"], "engine.nvme_path='x', but"),
        (["engine.zero_stage=3", "engine.offload_optimizer=nvme", "engine.nvme_path=x",
          "engine.own_checkpoints=true"], "writes the swap files of"),
        (["engine=torch", "engine.zero_stage=3"], "engine.zero_stage=3 needs engine=deepspeed"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_do_is_refused_with_what_to_choose(words, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        compose_run(["engine=deepspeed", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.offload=all"], "parallel.offload=all is none of none, optimizer, optimizer+"),
        (["train.precision=fp32"], "train.precision=fp32 has none"),
        (["quant=fp4_qat"], "does not go with quant.recipe=fp4_qat"),
        (["train.ema_decay=0.9"], "does not go with train.ema_decay=0.9"),
    ],
)  # fmt: skip
def test_what_offloaded_masters_cannot_do_is_refused(words, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        compose_run(["parallel.offload=optimizer+master", *words])


@pytest.mark.parametrize(
    ("name", "stage"),
    [("deepspeed", 2), ("deepspeed_zero1", 1), ("deepspeed_zero2", 2),
     ("deepspeed_zero2_offload", 2), ("deepspeed_zero3", 3), ("deepspeed_zero3_nvme", 3)],
)  # fmt: skip
def test_engine_groups_are_what_they_say(name, stage):
    engine = compose_run([f"engine={name}"]).engine
    assert (engine.name, engine.zero_stage) == (EngineName.deepspeed, stage)
    assert (engine.offload_optimizer is OffloadTo.cpu) == name.endswith("offload")
    assert (engine.offload_optimizer is OffloadTo.nvme) == name.endswith("nvme")


def test_rest_of_the_world_is_one_degree():
    parallel = compose_run(["parallel.dp_shard=-1", "parallel.pp=2"]).parallel
    resolved = parallel.resolve(8)
    assert (resolved.dp_shard, resolved.pp, resolved.world_size) == (4, 2, 8)
    with pytest.raises(ValueError, match=r"parallel\.pp=2 does not divide the world size 7"):
        parallel.resolve(7)
    with pytest.raises(ValueError, match="only one of them can be the rest"):
        compose_run(["parallel.dp_shard=-1", "parallel.dp_replicate=-1"])


def test_degrees_must_multiply_to_the_world_and_ep_divide_its_data_ranks():
    parallel = compose_run(["parallel.dp_shard=4", "parallel.ep=3"]).parallel
    with pytest.raises(ValueError, match="ep=3 must divide the 4 data ranks"):
        parallel.resolve(4)
    with pytest.raises(ValueError, match="= 4 ranks, but the world size is 1"):
        parallel.resolve(1)


def test_plus_is_taken_off_groups_of_the_defaults_list_only():
    assert set(groups()) >= {"model", "data", "optim", "quant", "parallel", "train", "experiment"}
    args = ["+model=v4_tiny", "optim=adamw", "train.steps=3", "-m", "--cfg", "job"]
    expected = ["-m", "--cfg", "job", "model=v4_tiny", "optim=adamw", "train.steps=3"]
    assert normalise(args) == expected
    assert compose_run(["+model=v4_tiny"]) == compose_run(["model=v4_tiny"])


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("model=v4_nan", r"model=v4_nan: .*did you mean v4_nano\?"),
        ("optim=muon,adanw", r"optim=adanw: .*did you mean adamw\?"),
        ("train=nothing_like_it", r"train=nothing_like_it: conf/train has no such file; there are"),
        ("v4_flash", r"cannot read the argument 'v4_flash': did you mean model=v4_flash\?"),
        ("learning_rate", r"cannot read the argument 'learning_rate': give GROUP=OPTION"),
        ("+foo=1", r"unknown config key foo=1"),
        ("train.stepz=1", r"did you mean train.steps\?"),
        ("trian.steps=1", r"did you mean train\?"),
        ("modle=v4_nano", r"did you mean model\?"),
        ("--modle", r"unknown flag --modle"),
        ("--multi-run", r"did you mean --multirun\?"),
    ],
)
def test_command_line_errors_name_the_nearest_match(arg, message):
    with pytest.raises(UserError, match=message):
        normalise([arg])


def test_keys_inside_lists_and_dicts_are_followed():
    assert unknown_key(["train", "stages", "0", "seq_len"], RunConfig) is None
    assert unknown_key(["train", "stages", "0", "seq"], RunConfig) == (
        "did you mean train.stages.0.seq_len?"
    )


def test_experiment_wins_over_its_model_recipe_and_the_command_line_over_both():
    recipe = compose_run(["model=v4_tiny"])
    preset = compose_run(["experiment=debug_cpu"])
    assert preset.model == recipe.model
    assert (recipe.train.eval_every, preset.train.eval_every) == (0, 10)
    assert compose_run(["experiment=debug_cpu", "train.eval_every=3"]).train.eval_every == 3


def test_every_group_option_is_offered():
    assert {"v4_tiny", "v4_nano", "v4_flash", "v4_pro"} <= set(options("model"))


def test_describe_falls_back_to_the_text():
    class OddError(Exception):
        pass

    assert describe(OddError("first\nsecond")) == "config: first"


def test_a_very_long_name_of_a_source_is_cut_in_the_message():
    with pytest.raises(UserError) as told:
        load_with(data={"sources": {"a" * 5000: None}})
    assert len(str(told.value)) < 300
