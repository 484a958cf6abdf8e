"""The table of run_folder/identity.py: each row alone, and what it must say of well-known keys.

The first half has the table itself as its oracle; the second is written out from what a user may
change between the parts of a run.
"""

import json
import logging
from dataclasses import replace

import pytest

from data.config import DataConfig, SourceConfig
from train.config.flat import ABSENT, flat_config, flatten, pairs
from train.config.schema import RunConfig, StageConfig, TrainConfig
from train.errors import UserError
from train.run_folder.identity import (
    TABLE,
    RunIdentity,
    Severity,
    Use,
    check,
    check_ranks,
    differences,
    recorded_in,
    row_of,
)

pytestmark = pytest.mark.core

STAGES = [
    StageConfig("short", 1000, seq_len=64, lr=1e-3, micro_batch_size=1),
    StageConfig("middle", 2000, micro_batch_size=1),
    StageConfig("long", 3000, micro_batch_size=1),
]


def config(**train):
    data = DataConfig(sources={"a": SourceConfig(weight=0.5), "b": SourceConfig(weight=0.5)})
    return flat_config(RunConfig(data=data, train=TrainConfig(**{"stages": STAGES, **train})))


def record(**changes):
    stored = {"streamed": False, "train": "a" * 64, "validation": "b" * 64, "store": "c" * 64}
    fields = {
        "config": config(),
        "tokenizer": {"hash": "d" * 64, "vocab_size": 260, "eos_id": 256, "fim_ids": [257]},
        "sources": {"a": stored, "b": {"streamed": True, "files": [[9, "e" * 64]]}},
        "code": {"commit": "f" * 40, "changed_files": 0, "source_sha256": "0" * 64},
        "libraries": {"numpy": "1"},
        "layout": {"ep": 1},
        "kernels": {"kernels": "fast"},
        "precision": {"compute": "fp32"},
    }
    return RunIdentity(**(fields | changes))


def keys():
    return [key for group in record().groups().values() for key in group]


def changed(key, before=None):
    """The record with another value for one key."""
    before = before or record()
    if key in before.config:
        value = before.config[key]
        other = f"{value}x" if isinstance(value, str) else 7 if value is None else [value]
        return replace(before, config={**before.config, key: other})
    name, _, rest = key.partition(".")
    if ".content." in key:
        name, source, rest = "sources", *key.removeprefix("data.sources.").split(".content.")
        rest_of = {**before.sources[source], rest: "changed"}
        return replace(before, sources={**before.sources, source: rest_of})
    if key == "data.sources":
        return replace(before, sources={"a": before.sources["a"]})
    return replace(before, **{name: {**getattr(before, name), rest: "changed"}})


def named(row):
    """A key that the row decides about."""
    return next(key for key in keys() if row_of(key) is row)


@pytest.mark.parametrize("row", TABLE, ids=[row.pattern for row in TABLE])
def test_a_row_alone_does_what_it_says(row, caplog):
    key = named(row)
    # Stages take values of the section over, which are then compared there.
    before = record() if "stages" in key else record(config=config(stages=[]))
    now = changed(key, before)
    for use in Use:
        found = differences(use, before, now)
        assert [d.key for d in found[row.verdict(use)]] == [key]
        assert sum(len(some) for some in found.values()) == 1
        caplog.clear()
        with caplog.at_level(logging.INFO):
            if row.verdict(use) is Severity.refuse:
                with pytest.raises(UserError, match="WHERE holds a run with") as caught:
                    check(use, before, now, "WHERE")
                assert str(caught.value).partition(": give")[0].count(f"{key}=") == 2
                assert "\n" not in str(caught.value)
            else:
                check(use, before, now, "WHERE")
        assert (key in caplog.text) == (row.verdict(use) is Severity.tell)


def test_equal_records_are_silent(caplog):
    with caplog.at_level(logging.INFO):
        for use in Use:
            check(use, record(), record(), "WHERE")
    assert not caplog.text


FREE = (
    "run_dir", "data.cache_dir", "data.workers", "data.sources.a.path", "data.validation.bytes",
    "wandb.mode", "sample.tokens", "train.eval_every", "train.keep_checkpoints",
)  # fmt: skip
TOLD = (
    "parallel.ep", "model.kernels", "model.deterministic", "train.steps", "train.micro_batch_size",
    "train.device", "code.source_sha256", "libraries.numpy", "layout.ep", "train.recovery.window",
)  # fmt: skip
REFUSED = (
    "seed", "optim.lr", "optim.name", "model.hidden_size", "model.attention", "quant.recipe",
    "data.fim.rate", "data.packing.pool_documents", "data.sources.a.weight", "data.sources",
    "data.sources.a.content.train", "data.sources.a.content.validation", "tokenizer.hash",
    "train.stages[0].lr", "train.ema_decay", "train.precision", "init_from", "init_seed_offset",
)  # fmt: skip


@pytest.mark.parametrize(
    ("some", "verdict"),
    [(FREE, Severity.ignore), (TOLD, Severity.tell), (REFUSED, Severity.refuse)],
)
def test_resume(some, verdict):
    assert {key: row_of(key).resume for key in some} == dict.fromkeys(some, verdict)


@pytest.mark.parametrize("use", [Use.init_from, Use.evaluate, Use.export])
def test_weights_elsewhere_need_their_model_and_tokenizer_and_no_more(use):
    refused = {key for key in keys() if row_of(key).verdict(use) is Severity.refuse}
    assert {"tokenizer.hash", "model.hidden_size", "model.rope_theta"} <= refused
    rest = {key for key in refused if not key.startswith(("tokenizer.", "model."))}
    assert rest == ({"init_from"} if use is Use.evaluate else set())


def test_ranks_must_agree_in_all_but_places_and_workers():
    free = {key for key in keys() if row_of(key).ranks is not Severity.refuse}
    assert free == {
        "data.cache_dir", "data.workers", "code.commit", "code.changed_files",
        "data.sources.a.content.store",
    }  # fmt: skip


def test_ranks_are_named(caplog):
    records = [
        record(),
        record(),
        changed("data.sources.a.content.train"),
        changed("libraries.numpy"),
    ]
    with pytest.raises(UserError) as caught:
        check_ranks(records)
    assert str(caught.value) == (
        "ranks differ: rank 2 has data.sources.a.content.train=changed, rank 0 aaaaaaaaaaaa;"
        " rank 3 has libraries.numpy=changed, rank 0 1"
    )
    check_ranks([record(), changed("data.workers")])


# ---- what is not compared ------------------------------------------------------------------------
def test_what_is_not_known_is_not_compared():
    for key in ("code", "tokenizer", "sources", "libraries"):
        for use in Use:
            check(use, replace(record(), **{key: None}), record(), "WHERE")
    half = {**record().tokenizer, "hash": None}
    check(Use.resume, replace(record(), tokenizer=half), record(), "WHERE")


def test_origin_of_a_run_that_has_weights_of_its_own():
    """Not named: nothing asked for. Another one: asked for, and it would not be in effect."""
    began = replace(record(), config={**config(), "init_from": "A"})
    other = replace(record(), config={**config(), "init_from": "B"})
    check(Use.resume, began, record(), "WHERE", done_tokens=5)
    assert record().continuing(began).config["init_from"] == "A"
    for now, done in ((other, 5), (record(), 0)):
        with pytest.raises(UserError, match="init_from=A, but now init_from="):
            check(Use.resume, began, now, "WHERE", done)


# ---- stages --------------------------------------------------------------------------------------
def with_stage(index, **values):
    stages = [replace(s, **values) if i == index else s for i, s in enumerate(STAGES)]
    return replace(record(), config=config(stages=stages))


@pytest.mark.parametrize("key", ["lr", "mtp_loss_weight", "seq_len", "name", "quantised"])
def test_a_stage_that_is_over_is_over(key):
    now = with_stage(0, **{key: "new" if key == "name" else 3})
    check(Use.resume, record(), now, "WHERE", done_tokens=1000)
    with pytest.raises(UserError, match=rf"train\.stages\[0\]\.{key}="):
        check(Use.resume, record(), now, "WHERE", done_tokens=999)
    still = with_stage(1, **{key: "new" if key == "name" else 3})
    with pytest.raises(UserError, match=rf"train\.stages\[1\]\.{key}="):
        check(Use.resume, record(), still, "WHERE", done_tokens=1000)


@pytest.mark.parametrize("key", ["until_tokens", "global_batch_tokens", "ramp_tokens"])
def test_what_later_steps_are_numbered_by_stays(key):
    with pytest.raises(UserError, match=rf"train\.stages\[0\]\.{key}="):
        check(Use.resume, record(), with_stage(0, **{key: 10}), "WHERE", done_tokens=2500)


def test_the_last_stage_counts_when_it_is_over():
    """The final evaluation is in its state."""
    with pytest.raises(UserError, match=r"train\.stages\[2\]\.quantised"):
        check(Use.resume, record(), with_stage(2, quantised=False), "WHERE", done_tokens=3000)


def test_values_that_stages_take_over_are_compared_where_they_act():
    """seq_len of the section reaches the stages that name none: the second and third."""
    now = replace(record(), config=config(seq_len=32))
    with pytest.raises(UserError, match=r"train\.stages\[1\]\.seq_len=512, but now"):
        check(Use.resume, record(), now, "WHERE")
    check(Use.resume, *(replace(r, config=own_lengths(r)) for r in (record(), now)), "WHERE")


def own_lengths(one):
    return {**one.config, "train.stages[1].seq_len": 8, "train.stages[2].seq_len": 8}


def test_a_stage_more_or_less_is_a_difference():
    for before, now in ((STAGES, STAGES[:2]), (STAGES[:2], STAGES), ([], STAGES), (STAGES, [])):
        records = [replace(record(), config=config(stages=some)) for some in (before, now)]
        with pytest.raises(UserError, match="but now train"):
            check(Use.resume, *records, "WHERE", done_tokens=0)


# ---- keys of another time ------------------------------------------------------------------------
def test_key_that_the_record_lacks_has_its_default():
    old = {key: value for key, value in config().items() if key != "train.ema_decay"}
    check(Use.resume, replace(record(), config=old), record(), "WHERE")
    now = replace(record(), config=config(ema_decay=0.5))
    with pytest.raises(UserError, match=r"train\.ema_decay=0\.0, but now train\.ema_decay=0\.5"):
        check(Use.resume, replace(record(), config=old), now, "WHERE")


def test_key_that_the_code_no_longer_has_is_told(caplog):
    old = {**config(), "train.forgotten": 3}
    with caplog.at_level(logging.INFO):
        check(Use.resume, replace(record(), config=old), record(), "WHERE")
    assert "train.forgotten 3 -> gone from this code" in caplog.text


def test_item_of_a_list_or_dict_is_no_forgotten_key():
    before = {"optim.muon.splits.x": "whole", "optim.muon.newton_schulz[7].a": 1.0}
    assert {now for _, _, now in pairs(before, {})} == {ABSENT}


def test_no_source_named_is_the_embedded_corpus():
    named = RunConfig(data=DataConfig(sources={"embedded": SourceConfig()}))
    unnamed = flat_config(RunConfig())
    assert all(a == b for _, a, b in pairs(unnamed, flat_config(named)))


def test_flat_config_is_strict_json_and_forgets_nothing():
    found = json.loads(json.dumps(config(), allow_nan=False))
    assert found == config()
    assert found["train.stages[0].lr"] == 1e-3
    assert found["data.sources.a.packages"] == ["stdlib", "torch", "numpy"]
    assert flatten({"a": {"b": float("inf"), "c": []}}) == {"a.b": "inf", "a.c": []}


# ---- old records ---------------------------------------------------------------------------------
def state(**source):
    """As checkpoints were before there was a record."""
    tokenizer = {"hash": "d" * 64, "vocab_size": 260}
    sources = {"a": {"kind": "jsonl", "weight": None, **source}}
    return {"loader": {"manifest": {"seed": 0, "tokenizer": tokenizer, "sources": sources}}}


def test_old_store_is_known_by_its_old_hash():
    now = replace(record(), sources={"a": record().sources["a"]})
    same = recorded_in(state(store="c" * 64), config(), now, "x")
    check(Use.resume, same, now, "WHERE")
    other = recorded_in(state(store="9" * 64), config(), now, "x")
    with pytest.raises(UserError, match=r"data\.sources\.a\.content\.train=999999999999, but now"):
        check(Use.resume, other, now, "WHERE")


def test_old_stream_is_known_by_the_sizes_of_its_files():
    now = replace(record(), sources={"a": record().sources["b"] | {"repository": ""}})
    same = recorded_in(state(stream={"files": [["/old/path", 9, 123]]}), config(), now, "x")
    check(Use.resume, same, now, "WHERE")
    other = recorded_in(state(stream={"files": [["/old/path", 8, 123]]}), config(), now, "x")
    with pytest.raises(UserError, match=r"data\.sources\.a\.content\.files="):
        check(Use.resume, other, now, "WHERE")


def test_old_tokenizer_is_known():
    other = state(store="c" * 64)
    other["loader"]["manifest"]["tokenizer"]["hash"] = "9" * 64
    with pytest.raises(UserError, match=r"tokenizer\.hash=999999999999, but now"):
        check(Use.init_from, recorded_in(other, None, record(), "x"), record(), "WHERE")


def test_state_that_knows_nothing_is_compared_in_nothing():
    check(Use.init_from, recorded_in({}, None, record(), "x"), record(), "WHERE")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "holds no record"),
        ({"config": {}}, "holds no record"),
        ({"format": 9}, "has format 9, this code reads format 1"),
        ({"format": 1, "code": "x"}, "code is a str"),
    ],
)
def test_record_that_is_none_is_the_users_error(content, says):
    with pytest.raises(UserError, match=f"FILE.*{says}"):
        RunIdentity.from_json(content, "FILE")


def test_record_survives_json():
    again = json.loads(json.dumps(record().as_json(), allow_nan=False))
    assert RunIdentity.from_json(again, "FILE") == record()
