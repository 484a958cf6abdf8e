"""What DeepSpeed is told, and what a DeepSpeed JSON of the user's own may say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from parallel.config import EngineConfig, EngineName, OffloadTo
from parallel.errors import ConfigError
from parallel.zero_config import AIO, OFFLOAD_TUNING, TUNING, deepspeed_config


def told(tmp_path, own, stage=2, offload=OffloadTo.none):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(own))
    engine = EngineConfig(EngineName.deepspeed, stage, offload, config=str(path))
    return deepspeed_config(engine, rows=2, grad_clip=1.0, pin_memory=False)


def test_file_that_agrees_is_taken_with_all_that_it_tunes(tmp_path):
    config = told(
        tmp_path,
        {
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0, "bf16": {"enabled": False}, "wall_clock_breakdown": True,
            "zero_optimization": {
                "stage": 2, "reduce_bucket_size": 1000,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
            },
        },
        offload=OffloadTo.cpu,
    )  # fmt: skip
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert config["gradient_clipping"] == 0.0  # ours, on the norm that is asked for


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ([], "holds a list, not an object"),
        ({"train_micro_batch_size_per_gpu": 4}, "but train.micro_batch_size=2"),
        ({"gradient_clipping": 0.5}, "but optim.grad_clip=1.0"),
        ({"bf16": {"enabled": True}}, "say train.precision=bf16"),
        ({"fp16": {"enabled": "auto"}}, "say train.precision=bf16"),
        ({"optimizer": {"type": "Muon"}}, "the run's optimizer is the section optim"),
        ({"scheduler": {}}, "says scheduler"),
        ({"train_batch_size": 8}, "take it out or say auto"),
        ({"gradient_accumulation_steps": 2}, "take it out or say auto"),
        ({"aio": {"use_gds": True}}, "aio.use_gds=True, which would read past the check"),
        ({"prescale_gradients": True}, "says prescale_gradients, which this engine does not use"),
        ({"zero_optimization": {"stage": 3}}, "stage=3, but engine.zero_stage=2"),
        ({"zero_optimization": 2}, "zero_optimization=2 is no object"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
         "device=cpu, but engine.offload_optimizer=none"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}},
         "device=nvme, but engine.offload_parameters=none"),
        ({"zero_optimization": {"offload_optimizer": {"device": "none", "ratio": 0.5}}},
         "offload_optimizer.ratio, which this engine does not use"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer=cpu is no object"),
        ({"zero_optimization": {"stage3_max_live_parameters": 5}},
         "stage3_max_live_parameters, which DeepSpeed reads at stage 3, but engine.zero_stage=2"),
        ({"zero_optimization": {"sub_group_size": 5}}, "reads at stage 3, but engine.zero_stage=2"),
        ({"zero_optimization": {"allgather_partitions": True}}, "this engine does not use"),
        ({"bf16": True}, "says bf16.enabled=True, which would round"),
        ({"aio": {"block_size": 4096}}, "says aio, but engine.offload_optimizer=none"),
        ({"aio": {"blok_size": 4096}}, "says aio.blok_size, which this engine does not use"),
        ({"aio": 5}, "aio=5 is no object"),
        ({"steps_per_print": 10}, "says steps_per_print, which this engine does not use"),
        ({"comms_logger": {"enabled": True}}, "says comms_logger, which this engine does not use"),
        ({"zero_optimization": {"zero_quantized_gradients": True}},
         "says zero_optimization.zero_quantized_gradients"),
    ],
)  # fmt: skip
def test_file_that_differs_or_would_be_ignored_is_refused(tmp_path, own, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        told(tmp_path, own)


@pytest.mark.parametrize(
    ("stage", "where", "own", "line"),
    [
        (3, OffloadTo.none, {"round_robin_gradients": True}, "reads at stage 1, 2, but"),
        (2, OffloadTo.cpu, {"offload_optimizer": {"device": "cpu", "pipeline_read": True}},
         "offload_optimizer.pipeline_read, which this engine does not use with"
         " engine.offload_optimizer=cpu"),
        (2, OffloadTo.none, {"offload_optimizer": {"device": "none", "pin_memory": True}},
         "offload_optimizer.pin_memory, which this engine does not use with"
         " engine.offload_optimizer=none"),
        (2, OffloadTo.cpu, {"offload_optimizer": {"device": "cpu", "nvme_path": "/drive"}},
         "offload_optimizer.nvme_path, which this engine does not use"),
    ],
)  # fmt: skip
def test_key_that_acts_elsewhere_is_refused_where_it_does_not(tmp_path, stage, where, own, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        told(tmp_path, {"zero_optimization": own}, stage, where)


def test_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    engine = EngineConfig(EngineName.deepspeed, config=str(path))
    with pytest.raises(ConfigError, match="cannot be read as JSON: it says stage twice"):
        deepspeed_config(engine, rows=2, grad_clip=1.0, pin_memory=False)


def test_every_key_that_is_taken_is_one_of_the_release():
    found = importlib.util.find_spec("deepspeed")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    engine = (root / "runtime" / "engine.py").read_text()
    for key in TUNING:
        assert f"self._config.zero_config.{key.removeprefix('stage3_')}" in engine, key
    parts = (root / "runtime" / "zero" / "offload_config.py").read_text()
    for keys in OFFLOAD_TUNING.values():
        assert all(re.search(rf"^    {key}: ", parts, re.M) for key in keys)
    reader = (root / "runtime" / "swap_tensor" / "constants.py").read_text()
    assert all(f'"{key}"' in reader for key in AIO)


def test_release_is_told_what_its_own_defaults_would_do():
    """Else it takes another F.linear for the whole process, and 2 GB of buckets."""
    zero = deepspeed_config(EngineConfig(EngineName.deepspeed), 2, 1.0, False)["zero_optimization"]
    assert zero["memory_efficient_linear"] is False
    assert zero["reduce_bucket_size"] < 10**8


def test_file_that_is_none_is_named(tmp_path):
    engine = EngineConfig(EngineName.deepspeed, config=str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"engine.config=.*absent.json cannot be read as JSON"):
        deepspeed_config(engine, rows=2, grad_clip=1.0, pin_memory=False)
