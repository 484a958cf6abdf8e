"""A run folder as the trainer leaves one, of a tiny model; and what else the tests share."""

from dataclasses import replace

import torch

from data.config import DataConfig
from model.state_dict import load_official
from model.transformer import DeepSeekV4
from quant.config import QuantConfig
from tests.parity.configs import tiny_config
from tests.parity.weights import random_weights
from train.checkpoint.manager import Checkpoints
from train.config.load import dump
from train.config.schema import RunConfig, TrainConfig
from train.run_folder.folder import CHECKPOINTS, CONFIG

CONFIG_TINY = tiny_config(vocab_size=320, num_nextn_predict_layers=1, kernels="fast")
"""Every layer kind, an MTP block, and rows beyond the 260 ids of the byte tokenizer."""


def tiny_model(config=CONFIG_TINY, seed=3):
    model = DeepSeekV4(config)
    load_official(model, random_weights(config, seed))
    return model.requires_grad_(False)


def write_run(folder, model=None, quant=None, **train):
    """The files of a finished run that a reader needs."""
    model = model or tiny_model()
    values = {"steps": 10, "seq_len": 64, "global_batch_tokens": 128, "micro_batch_size": 2}
    run = RunConfig(
        run_dir=str(folder),
        model=model.config,
        data=DataConfig(tokenizer="byte"),
        quant=quant or QuantConfig(),
        train=TrainConfig(**(values | train)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(dump(run), "utf-8")
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["optim.embed.weight.step"] = torch.ones(1)
    state = {"progress": {"step": 10, "tokens": 1280, "skipped_steps": 0}}
    Checkpoints(folder / CHECKPOINTS).save(10, tensors, state)
    return model


def bf16_model(model):
    """The same with weights that bf16 holds exactly."""
    again = tiny_model(replace(model.config))
    for ours, theirs in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        ours.copy_(theirs.bfloat16() if theirs.is_floating_point() else theirs)
    return again
