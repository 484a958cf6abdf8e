"""What DeepSpeed is told, and what a DeepSpeed JSON of the user's own may say."""

import json
import re

import pytest

from parallel.config import EngineConfig, EngineName, OffloadTo
from parallel.errors import ConfigError
from parallel.zero_config import deepspeed_config


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
        ({"zero_optimization": {"zero_quantized_gradients": True}},
         "says zero_optimization.zero_quantized_gradients"),
    ],
)  # fmt: skip
def test_file_that_differs_or_would_be_ignored_is_refused(tmp_path, own, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        told(tmp_path, own)


def test_release_is_told_what_its_own_defaults_would_do():
    """Else it takes another F.linear for the whole process, and 2 GB of buckets."""
    zero = deepspeed_config(EngineConfig(EngineName.deepspeed), 2, 1.0, False)["zero_optimization"]
    assert zero["memory_efficient_linear"] is False
    assert zero["reduce_bucket_size"] < 10**8


def test_file_that_is_none_is_named(tmp_path):
    engine = EngineConfig(EngineName.deepspeed, config=str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"engine.config=.*absent.json cannot be read as JSON"):
        deepspeed_config(engine, rows=2, grad_clip=1.0, pin_memory=False)
