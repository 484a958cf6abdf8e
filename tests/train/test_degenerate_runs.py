"""Sizes that are small but right run to their end; those that cannot are refused by their reason.

Nothing here is planted: a false alarm of the audit, a division by a size of one or an empty tensor
shows as an exception.
"""

import json
import logging
import random
from pathlib import Path

import pytest

from train.errors import ExitCode
from train.pretrain import cli

SMALL = """
model=v4_tiny model.vocab_size=260 model.hidden_size=32 model.num_hidden_layers=3
model.compress_ratios=[0,4,8,0] model.layer_kinds=[swa,csa,hca] model.num_attention_heads=2
model.head_dim=16 model.q_lora_rank=16 model.o_lora_rank=16 model.index_head_dim=16
model.index_topk=4 model.n_routed_experts=4 model.moe_intermediate_size=16 model.sliding_window=8
train.steps=2 train.seq_len=32 train.global_batch_tokens=128 train.micro_batch_size=2
train.eval_tokens=128 train.async_checkpoint=false sample.tokens=2 optim.schedule.warmup_steps=0
data.tokenizer=byte data.validation.bytes=0 data.packing.pool_documents=16
""".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Files of words, of one document, of one character a document, and of titles."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)

    def jsonl(name: str, documents: list[str]) -> None:
        lines = (json.dumps({"text": text}) for text in documents)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    words = ["".join(rng.choices("abcde", k=4)) for _ in range(50)]
    jsonl("words", [" ".join(rng.choices(words, k=rng.choice((5, 20, 60)))) for _ in range(60)])
    jsonl("one", ["hello world " * 50])
    jsonl("character", ["a"])
    jsonl("characters", list("abcdefghijklmnopqrstuvwxyz" * 20))
    jsonl("titles", [f"Title {i} of many" for i in range(400)])
    return folder


@pytest.fixture
def finish(texts, tmp_path, capsys, monkeypatch):
    """Run a command line: exit code and error line, empty where there is none."""
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(args: str) -> tuple[int, str]:
        given = args.split()
        text = next((a.partition("=")[2] for a in given if a.startswith("text=")), "words")
        given = [a for a in given if not a.startswith("text=")]
        code = cli([
            *SMALL, "data.sources.text.kind=jsonl", f"data.sources.text.path={texts}/{text}.jsonl",
            f"data.cache_dir={texts}/cache", f"run_dir={tmp_path}/run", *given,
        ])  # fmt: skip
        errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
        return code, "".join(errors)

    return run


ONE_LAYER = "model.num_hidden_layers=1 model.num_hash_layers=0"
NO_MTP = "model.num_nextn_predict_layers=0"
ONE_EXPERT = "model.n_routed_experts=1 model.num_experts_per_tok=1"
TOP_1 = "model.num_experts_per_tok=1"
RUNS = {
    "one expert": ONE_EXPERT,
    "one of each": f"{ONE_LAYER} {NO_MTP} {ONE_EXPERT} model.compress_ratios=[4]"
    " model.layer_kinds=[csa] model.num_attention_heads=1 model.o_groups=1 model.index_n_heads=1"
    " model.hc_mult=1 model.hc_sinkhorn_iters=1 model.n_shared_experts=0 model.sliding_window=1"
    " model.q_lora_rank=1 model.o_lora_rank=1 model.loss_chunk_tokens=1 train.steps=1"
    " train.monitor_every=1",
    "one layer without a window": f"{ONE_LAYER} {NO_MTP} model.compress_ratios=[0]"
    " model.layer_kinds=[dense] model.residual=plain",
    "hash layers only": f"{NO_MTP} {TOP_1} model.compress_ratios=[0,4,8] model.num_hash_layers=3"
    " model.n_routed_experts=64 train.bias_update_speed=0",
    "more experts than token ids": f"{TOP_1} model.n_routed_experts=512",
    "entries of one token": "model.compress_ratios=[0,1,1,0]",
    "entries longer than rows": "model.compress_ratios=[0,64,64,0] quant=deployed",
    "one chosen entry": "model.index_topk=1 train.indexer_loss_weight=0",
    "narrow rows": "model.kernels=reference model.hidden_size=1 model.moe_intermediate_size=1",
    "heads of two channels": "model.head_dim=2 model.qk_rope_head_dim=2 model.index_head_dim=2",
    "one row of two tokens": "train.seq_len=2 train.global_batch_tokens=2 train.micro_batch_size=1"
    " train.monitor_every=1",
    "one document": "text=one",
    "one document of a character": "text=character quant=fp4_qat",
    "documents of a character": "text=characters model.num_nextn_predict_layers=2"
    " model.compress_ratios=[0,4,8] train.global_batch_tokens=512",
    "titles": f"text=titles {TOP_1} model.n_routed_experts=128 model.num_hash_layers=3"
    " train.global_batch_tokens=4096 train.micro_batch_size=32",
    "no side losses": "train.mtp_loss_weight=0 train.mtp_loss_weight_decay=0"
    " train.balance_loss_weight=0 train.indexer_loss_weight=0",
    "no mtp loss": "train.mtp_loss_weight=0 train.mtp_loss_weight_decay=0",
    "yarn for longer rows": "model.yarn_from_seq_len=64 optim.state_dtype=bf16",
    "a warm-up of small steps": "optim.schedule.warmup_steps=6 optim.lr=1e-8 optim=adamw",
}


LONG = {
    "one layer without a window", "hash layers only", "more experts than token ids",
    "entries longer than rows", "heads of two channels", "one document",
    "one document of a character", "no side losses", "yarn for longer rows", "narrow rows",
}  # fmt: skip


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=pytest.mark.slow if w in LONG else ()) for w in RUNS]
)
def test_small_but_right_sizes_run(what, finish):
    assert finish(RUNS[what]) == (ExitCode.finished, "")


REFUSED = {
    "train.seq_len=1": "train.seq_len=1 must be 2 or more",
    "model.index_topk=1": "model.index_topk=1 is one: train.indexer_loss_weight=0.01 must be 0",
    "model.moe_intermediate_size=1": "model.moe_intermediate_size=1 must be a multiple of 4",
    "train.precision=bf16 model.hidden_size=36": "model.hidden_size=36 must be a multiple of 8",
    "quant=deployed model.kernels=reference model.hidden_size=2": "for quant.experts",
    "model.vocab_size=257": "model.vocab_size=257 is smaller than the 260 ids of data.tokenizer",
    "data.tokenizer=bpe data.vocab_size=5000": "data.vocab_size=5000 asks for more entries of the",
    "data.vocab_size=9000000000": "data.vocab_size=9000000000 must lie in [1, 1048576]",
    "optim.muon.newton_schulz=[{steps:1,a:1.5,b:-0.5,c:0}]": "does not orthogonalise",
    "optim.lr=0.9 optim.adamw.weight_decay=2": "weight_decay=2.0 times optim.lr=0.9 must be below",
    "optim.grad_clip=1e-30": "optim.grad_clip=1e-30 must be 0 (off), or 1e-06 or more",
    "data.validation.bytes=9 text=one": "none can be held out",
}


@pytest.mark.parametrize("args", REFUSED)
def test_sizes_that_cannot_be_are_refused_by_their_reason(args, finish):
    code, line = finish(args)
    assert code == ExitCode.user_error
    assert REFUSED[args] in line


def test_bytes_run_with_the_vocabulary_that_their_file_advises(texts, tmp_path):
    advice = Path("conf/data/bytes.yaml").read_text().split("\n")[0]
    args = advice[advice.index("data=bytes") :].split()
    assert args == ["data=bytes", "model.vocab_size=260"]
    given = [arg for arg in SMALL if not arg.startswith(("data.tokenizer", "model.vocab"))]
    source = ["+data.sources.text.kind=jsonl", f"+data.sources.text.path={texts}/words.jsonl"]
    folders = [f"data.cache_dir={texts}/cache", f"run_dir={tmp_path}/run"]
    assert cli([*given, *args, *source, *folders]) == ExitCode.finished
