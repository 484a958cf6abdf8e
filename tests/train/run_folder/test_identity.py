"""Runs and their records: what a folder, a checkpoint and other ranks may differ in.

Each case starts as the entry does: the folder is checked, then everything is built.
"""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from data.config import SourceConfig, SourceKind, TextUnit
from data.errors import ConfigError
from data.prepare import build_tokenizer
from data.tokenizer import ByteTokenizer
from scripts import export_hf, generate, score
from tests.helpers import run_distributed
from tests.integration.small_run import (
    ROWS,
    SEQ_LEN,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.build import build
from train.checkpoint import files as checkpoint_files
from train.checkpoint.files import MANIFEST, STATE, describe_file, open_manifest, seal
from train.config.load import dump
from train.config.schema import StageConfig
from train.errors import ExitCode, UserError
from train.exchange.export import ExportFormat, ExportJob, export_folder
from train.exchange.import_model import import_checkpoint
from train.exchange.open import load_model, open_source
from train.exchange.tokenizer_files import tokenizer_json
from train.pretrain import cli
from train.run_folder import folder as run_folder
from train.run_folder import identity
from train.run_folder.folder import check_run_folder, read_identity, read_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    run = small_run(folder, corpus, steps=2, checkpoint_every=1, eval_every=0)
    assert fit(run)[0] == ExitCode.finished
    return run


@pytest.fixture
def run(done, tmp_path):
    """The same in a folder of its own."""
    shutil.copytree(done.run_dir, tmp_path / "run")
    return replace(done, run_dir=str(tmp_path / "run"))


def start(run):
    check_run_folder(run)
    return build(run)


def content(folder):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def refused(run, match):
    """Refused by one line, and nothing is touched."""
    before = content(run.run_dir)
    with pytest.raises(UserError, match=match) as caught:
        start(run)
    assert "\n" not in str(caught.value)
    assert content(run.run_dir) == before


def with_data(run, **changes):
    return replace(run, data=replace(run.data, **changes))


def with_train(run, **changes):
    return replace(run, train=replace(run.train, **changes))


def elsewhere(run, folder, **changes):
    """A new run that starts from the weights of another."""
    return replace(run, run_dir=str(folder), init_from=run.run_dir, **changes)


def corpus_at(run, path):
    source = replace(run.data.sources["words"], path=str(path))
    return with_data(run, sources={"words": source})


# ---- damage --------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "null\n", "- 1\n", "model: [unclosed", "word", "\0"])
def test_damaged_config_is_refused(run, text):
    Path(run.run_dir, "config.yaml").write_text(text)
    other = replace(run, optim=replace(run.optim, lr=1e-2))
    for asked in (run, other):
        refused(asked, r"config\.yaml (cannot be read|is damaged)")
    with pytest.raises(UserError, match=r"config\.yaml (cannot be read|is damaged)"):
        read_run(Path(run.run_dir))


@pytest.mark.parametrize("change", [lambda t: "", lambda t: "{}", lambda t: t[:-20],
                                    lambda t: t.replace('"seed": 0', '"seed": 1'),
                                    lambda t: "[" * 100_000])  # fmt: skip
def test_damaged_record_is_refused(run, change):
    path = Path(run.run_dir, "identity.json")
    path.write_text(change(path.read_text()))
    refused(run, r"identity\.json .*(cannot be read|is not what was written)")


def test_keys_that_a_config_lost_are_differences(run):
    """Without a record, as older code left it: half of the file is gone."""
    Path(run.run_dir, "identity.json").unlink()
    path = Path(run.run_dir, "config.yaml")
    path.write_text("run_dir: x\nseed: 0\n")
    refused(run, r"run_dir=.* holds a run with model\.\w+=.*, but now model\.")


def test_config_cut_at_the_end_of_a_line_is_damaged(run):
    """What is left of it can be read, and would have defaults for the rest."""
    path = Path(run.run_dir, "config.yaml")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    refused(run, r"config\.yaml is damaged: it lacks \w+.*which identity\.json has")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: it lacks"):
        read_run(Path(run.run_dir))


class Killed(BaseException):
    pass


def kill_at(monkeypatch, folder, name, record, config):
    """Write record and config; be killed in the middle of one of them."""
    write = checkpoint_files.write_durably

    def cut_off(path, text):
        if name in path.name:
            path.write_text(text[:30])
            raise Killed
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "write_durably", cut_off)
        with pytest.raises(Killed):
            run_folder.write_identity(folder, record, config, ByteTokenizer())


@pytest.mark.parametrize("name", ["identity.json", "config.yaml", "tokenizer.json"])
def test_killed_while_it_writes_the_record(run, monkeypatch, name):
    """Nothing of the old file is lost, and the same command starts."""
    folder = Path(run.run_dir)
    before = content(folder)
    kill_at(monkeypatch, folder, name, read_identity(folder), dump(run))
    assert content(folder)[str(folder / name)] == before[str(folder / name)]
    assert start(run).state.progress.step == 2


@pytest.mark.parametrize("name", ["identity.json", "config.yaml", "tokenizer.json"])
def test_new_folder_of_a_start_that_was_killed_can_be_started_in(run, tmp_path, monkeypatch, name):
    new = replace(run, run_dir=str(tmp_path / "new"))
    kill_at(monkeypatch, tmp_path / "new", name, read_identity(Path(run.run_dir)), dump(new))
    check_run_folder(new)


def test_files_that_go_by_themselves_are_no_strangers(run, tmp_path):
    new = replace(run, run_dir=str(tmp_path / "new"))
    (tmp_path / "new").mkdir()
    for name in (".config.yaml.writing", ".nfs0000000000a1"):
        (tmp_path / "new" / name).write_text("x")
    check_run_folder(new)


# ---- going on ------------------------------------------------------------------------------------
def test_moved_corpus_other_cache_and_workers_go_on_to_the_bit(run, done, tmp_path, caplog):
    shutil.copy(done.data.sources["words"].path, tmp_path / "moved.jsonl")
    longer = with_train(run, steps=4, micro_batch_size=1)
    away = with_data(
        corpus_at(longer, tmp_path / "moved.jsonl"), cache_dir=str(tmp_path / "cache"), workers=2
    )
    with caplog.at_level(logging.INFO, identity.log.name):
        check_run_folder(away)
        assert fit(away)[0] == ExitCode.finished
    assert [r.getMessage() for r in caplog.records if r.name == identity.log.name] == [
        f"run_dir={run.run_dir}: differs from what was recorded, as it may: train.steps 2 -> 4"
        " (schedules end there, unless stages fix their end), train.micro_batch_size 2 -> 1"
    ]
    shutil.copytree(done.run_dir, tmp_path / "same")
    same = replace(longer, run_dir=str(tmp_path / "same"))
    assert fit(same)[0] == ExitCode.finished
    assert metrics_of(away) == metrics_of(same)
    assert differing(final_tensors(away), final_tensors(same)) == []


def test_other_text_is_refused_by_name(run, tmp_path):
    refused(
        corpus_at(run, other_text(run, tmp_path)),
        r"run_dir=.* holds a run with data\.sources\.words\.content\.train=\w{12}, but now ",
    )


def other_text(run, folder):
    """The corpus with one letter more in every document."""
    text = Path(run.data.sources["words"].path).read_text()
    (folder / "corpus.jsonl").write_text(text.replace('"}', 'x"}'))
    return folder / "corpus.jsonl"


def test_other_tokenizer_is_refused(run, tmp_path):
    refused(
        with_data(run, tokenizer=str(reversed_bytes(tmp_path))),
        r"tokenizer\.hash=\w{12}, but now tokenizer\.hash=\w{12} \(data\.tokenizer=byte, now ",
    )


def reversed_bytes(folder):
    """A tokenizer of as many ids as the byte tokenizer has, with other meanings."""
    inner = tokenizer_json(ByteTokenizer())
    vocab = inner["model"]["vocab"]
    inner["model"]["vocab"] = {token: 255 - number for token, number in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(inner))
    return folder / "tokenizer.json"


def test_fewer_steps_than_are_done_is_refused(run):
    refused(with_train(run, steps=1), r"train\.steps=1 ends the run before step 2, which run_dir=")


def test_stage_that_is_over_may_change_and_one_to_come_may_not(corpus, tmp_path):
    batch = ROWS * SEQ_LEN
    stages = [StageConfig("one", batch), StageConfig("two", 3 * batch)]
    run = small_run(tmp_path / "run", corpus, steps=1, eval_every=0, stages=stages)
    fit(run)
    whole = with_train(run, steps=0)
    over = [replace(stages[0], mtp_loss_weight=0.1), stages[1]]
    assert start(with_train(whole, stages=over)).state.progress.step == 1
    refused(
        with_train(whole, stages=[stages[0], replace(stages[1], mtp_loss_weight=0.1)]),
        r"train\.stages\[1\]\.mtp_loss_weight=None, but now train\.stages\[1\]\.mtp_loss_weight=0",
    )


# ---- starting from, evaluating -------------------------------------------------------------------
@pytest.mark.parametrize("eval_only", [False, True])
def test_weights_of_another_tokenizer_are_refused(done, tmp_path, eval_only):
    other = with_data(elsewhere(done, tmp_path / "new"), tokenizer=str(reversed_bytes(tmp_path)))
    with pytest.raises(UserError, match=r"init_from=.* holds a run with tokenizer\.hash=.*byte"):
        start(with_train(other, eval_only=eval_only))
    assert content(tmp_path / "new") == {}


def test_weights_of_another_model_are_refused(done, tmp_path):
    """Of the same shapes."""
    other = elsewhere(done, tmp_path / "new", model=replace(done.model, rope_theta=500.0))
    with pytest.raises(UserError, match=r"model\.rope_theta=10000\.0, but now model\.rope_theta="):
        start(other)


def test_weights_may_go_on_with_other_data_and_optimizer(done, tmp_path):
    source = SourceConfig(SourceKind.text, json.__file__, unit=TextUnit.paragraph)
    other = elsewhere(done, tmp_path / "new", seed=5, optim=replace(done.optim, lr=1e-4))
    other = with_train(with_data(other, sources={"code": source}), precision=done.train.precision)
    trainer = start(other)
    assert differing(
        {k: v for k, v in trainer.engine.state().items() if k.startswith("model.")},
        {k: v for k, v in final_tensors(done).items() if k.startswith("model.")},
    ) == []  # fmt: skip
    assert read_identity(tmp_path / "new").config["init_from"] == done.run_dir


def test_a_bare_checkpoint_knows_what_it_is(done, tmp_path):
    shutil.copytree(Path(done.run_dir, "checkpoints", "step_00000002"), tmp_path / "bare")
    new = replace(done, run_dir=str(tmp_path / "new"), init_from=str(tmp_path / "bare"))
    assert start(new).state.progress.step == 0
    other = with_data(new, tokenizer=str(reversed_bytes(tmp_path)))
    with pytest.raises(UserError, match=r"init_from=.*bare holds a run with tokenizer\.hash="):
        build(replace(other, run_dir=str(tmp_path / "other")))


def test_evaluation_in_the_runs_folder_may_ask_for_other_data_and_changes_nothing(run, tmp_path):
    with Path(run.run_dir, "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 3}\n')  # it is training on
    before = content(run.run_dir)
    source = replace(run.data.sources["words"], path=str(other_text(run, tmp_path)), streaming=True)
    asked = with_train(with_data(run, sources={"new": source}), eval_only=True)
    check_run_folder(asked)
    assert fit(replace(asked, optim=replace(run.optim, lr=1e-2)))[0] == ExitCode.finished
    after = content(run.run_dir)
    found = json.loads(after.pop(f"{run.run_dir}/evaluation.json"))
    assert after == before
    assert found["data"]["sources"] != read_identity(Path(run.run_dir)).sources


def test_evaluation_of_other_weights_needs_a_folder_without_its_own(run, done):
    asked = with_train(replace(run, init_from=done.run_dir), eval_only=True)
    refused(asked, r"init_from=, but now init_from=.*: give another run_dir")


def test_evaluation_of_nothing_is_refused_and_leaves_nothing(tmp_path, capsys):
    args = ["model=v4_tiny", "train.eval_only=true", f"run_dir={tmp_path}/new"]
    assert cli(args) == ExitCode.user_error
    line = capsys.readouterr().err
    assert line.startswith("error: train.eval_only=true has nothing to evaluate: run_dir=")
    assert line.count("\n") == 1
    assert not (tmp_path / "new").exists()


# ---- export, import ------------------------------------------------------------------------------
def edited(run, before, after):
    path = Path(run.run_dir, "config.yaml")
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    return Path(run.run_dir)


def test_export_with_another_tokenizer_is_refused(run, tmp_path):
    folder = Path(run.run_dir)
    assert open_source(folder).tokenizer().hash == ByteTokenizer.hash
    other = reversed_bytes(tmp_path)
    shutil.copy(other, folder / "tokenizer.json")
    says = r"checkpoint .* holds a run with tokenizer\.hash="
    with pytest.raises(UserError, match=rf"run/tokenizer\.json: {says}"):
        open_source(folder).tokenizer()
    (folder / "tokenizer.json").write_text('{"type": "byt')
    with pytest.raises(ConfigError, match=r"run/tokenizer\.json is not a tokenizer"):
        open_source(folder).tokenizer()
    # An older run has none: it is built as the config says, which may lead elsewhere by now.
    (folder / "tokenizer.json").unlink()
    assert open_source(folder).tokenizer().hash == ByteTokenizer.hash
    edited(run, "tokenizer: byte", f"tokenizer: {other}")
    with pytest.raises(UserError, match=rf"^{says}.*byte, "):
        open_source(folder).tokenizer()


def test_a_model_leaves_its_folder_when_its_text_is_gone(run, corpus, tmp_path):
    """Its tokenizer is kept there, and is what a run on other text starts from."""
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus, text)
    model = replace(run.model, vocab_size=512)
    asked = replace(corpus_at(run, text), run_dir=str(tmp_path / "bpe"), model=model)
    asked = with_data(asked, tokenizer="bpe", vocab_size=512, cache_dir=str(tmp_path / "cache"))
    assert fit(asked)[0] == ExitCode.finished
    trained = build_tokenizer(asked.data)
    text.unlink()
    shutil.rmtree(tmp_path / "cache")
    words = [asked.run_dir, str(tmp_path / "out")]
    assert export_hf.main(words) == ExitCode.finished
    assert load_model(tmp_path / "out")[1].encode("the text") == trained.encode("the text")
    (tmp_path / "prompt.txt").write_text("the text of a prompt")
    assert score.main([asked.run_dir, str(tmp_path / "prompt.txt")]) == ExitCode.finished
    assert generate.main([asked.run_dir, "--prompt", "the", "--tokens", "1"]) == ExitCode.finished
    new = elsewhere(asked, tmp_path / "new")
    new = with_data(corpus_at(new, other_text(run, tmp_path)), tokenizer=asked.run_dir)
    assert start(new).state.loader.tokenizer.hash == trained.hash


def test_export_as_another_model_is_refused(run):
    folder = edited(run, "rope_theta: 10000.0", "rope_theta: 500.0")
    with pytest.raises(UserError, match=r"model\.rope_theta=10000\.0, but now model\.rope_theta=5"):
        open_source(folder)


@pytest.fixture
def imported(done, tmp_path):
    """The weights of the run, exported and imported again: other files, the same model."""
    export_folder(
        open_source(Path(done.run_dir)), tmp_path / "out", ExportJob(ExportFormat.transformers)
    )
    import_checkpoint(open_source(tmp_path / "out"), tmp_path / "model")
    return replace(done, run_dir=str(tmp_path / "new"), init_from=str(tmp_path / "model"))


def test_imported_weights_know_their_model_and_tokenizer(imported, tmp_path, caplog):
    assert start(imported).state.progress.step == 0
    assert "does not say" not in caplog.text
    new = replace(imported, run_dir=str(tmp_path / "other"))
    for other, says in (
        (with_data(new, tokenizer=str(reversed_bytes(tmp_path))), r"tokenizer\.hash="),
        (replace(new, model=replace(new.model, rope_theta=500.0)), r"model\.rope_theta=10000\.0, "),
        (replace(new, model=replace(new.model, routers=["hash"] * 3)), r"model\.routers="),
    ):
        with pytest.raises(UserError, match=f"init_from=.*model holds a run with {says}"):
            start(other)


def test_imported_weights_without_a_tokenizer_say_so(imported, tmp_path, caplog):
    (tmp_path / "model" / "tokenizer.json").unlink()
    start(imported)
    assert "does not say with which tokenizer it was trained" in caplog.text


# ---- old folders ---------------------------------------------------------------------------------
@pytest.fixture
def old(run):
    """As it was before there was a record: the loader's state says what the data is."""
    Path(run.run_dir, "identity.json").unlink()
    for folder in Path(run.run_dir, "checkpoints").iterdir():
        state = json.loads((folder / STATE).read_text())
        record = state.pop("identity")
        words = record["sources"]["words"]
        state["loader"]["manifest"] = {
            "seed": 0, "fim_rate": 0.0, "pool_documents": 16,
            "tokenizer": {key: record["tokenizer"][key] for key in ("hash", "vocab_size")},
            "sources": {"words": {
                "store": words["store"], "kind": "jsonl", "weight": None,
                "documents": words["documents"], "tokens": words["tokens"],
            }},
        }  # fmt: skip
        (folder / STATE).write_text(json.dumps(state))
        manifest = open_manifest(folder)
        manifest["files"][STATE] = describe_file(folder / STATE)
        (folder / MANIFEST).write_text(seal(manifest))
    return run


def test_old_folder_goes_on_and_gets_a_record(old):
    longer = with_train(old, steps=3)
    check_run_folder(longer)
    assert fit(longer)[0] == ExitCode.finished
    assert read_identity(Path(old.run_dir)).config["train.steps"] == 3


def test_old_folder_of_another_run_is_refused(old, tmp_path):
    refused(replace(old, seed=1), "seed=0, but now seed=1")
    refused(corpus_at(old, other_text(old, tmp_path)), r"words\.content\.train=\w{12}, but now")


def test_old_weights_of_another_tokenizer_are_refused(old, tmp_path):
    other = with_data(elsewhere(old, tmp_path / "new"), tokenizer=str(reversed_bytes(tmp_path)))
    with pytest.raises(UserError, match=r"tokenizer\.hash=.*\(data\.tokenizer=byte, now"):
        start(other)


# ---- ranks ---------------------------------------------------------------------------------------
def on_ranks(rank, world, run, folder):
    os.environ["WORLD_SIZE"] = str(world)
    os.chdir(folder / str(rank))  # the same config, another text
    alike = "ranks differ: rank 1 has "
    with pytest.raises(UserError, match=rf"^{alike}data\.sources\.words\.content\.train="):
        build(run)
    with pytest.raises(UserError, match=rf"^{alike}seed=1, rank 0 0$"):
        build(replace(run, seed=rank))
    dist.barrier()


def test_ranks_of_different_data_or_config_do_not_train(corpus, tmp_path):
    run = corpus_at(small_run(tmp_path / "new", corpus), "corpus.jsonl")
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    shutil.copy(corpus, tmp_path / "0" / "corpus.jsonl")
    other_text(small_run(tmp_path / "new", corpus), tmp_path / "1")
    run_distributed(on_ranks, 2, run, tmp_path)
    assert not (tmp_path / "new").exists()
