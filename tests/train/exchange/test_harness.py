"""lm-evaluation-harness says the same of a run and of its export behind ``transformers``.

The task is written here from a seed: questions with four endings, one of them an empty context and
one longer than the model. Bound of a continuation: 1e-5 nats a token, as for logits of fp32 models
(tests/parity), which a log-softmax moves by no more than twice.
"""

import json
import random

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import ByteTokenizer
from model.generate import Sampling, generate
from scripts import eval as command
from tests.train.exchange.exchange_models import write_run
from train.errors import UserError
from train.exchange.export import ExportFormat, ExportJob, FloatType, export_folder
from train.exchange.harness import HarnessModel
from train.exchange.open import load_model, open_source
from train.exchange.score import score_continuation, token_nll

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and its libraries
COMMON = {"dataset_path": "json", "test_split": "test"}
TASKS = {
    "endings": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{whole}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "{{text}} ", "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n", "q"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(50)]

    def text(count):
        return " ".join(draw.choices(words, k=count))

    lines = [
        {"text": text(n), "choices": [" " + text(draw.randint(1, 4)) for _ in range(4)],
         "answer": draw.randrange(4), "whole": text(6 * n + 6)}
        for n in (0, 1, 5, 20)
    ]  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, values in TASKS.items():
        data = {"data_files": {"test": str(folder / "lines.jsonl")}, "cache_dir": str(folder / "c")}
        task = {"task": name, **COMMON, "dataset_kwargs": data, **values}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(folder)
    (folder / "receipt.json").write_text(json.dumps({"progress": {"step": 10}}))
    return folder


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory):
    """The run by our scorer, and its export by the harness's model of transformers."""
    out = tmp_path_factory.mktemp("export")
    job = ExportJob(ExportFormat.transformers, FloatType.fp32)
    export_folder(open_source(run), out, job)
    model, tokenizer = load_model(run)
    hf = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    theirs = HFLM(
        pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(out), batch_size=1, device="cpu"
    )
    return HarnessModel(model, tokenizer, chunk_tokens=16), theirs


@pytest.fixture(scope="module")
def answers(pair, tasks):
    """Results of ours and of theirs, with what came of every request."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return {
        name: simple_evaluate(
            model=lm, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        for name, lm in zip(("ours", "theirs"), pair, strict=True)
    }


def responses(found, task):
    """(arguments, responses) of every request, in order."""
    for sample in found["samples"][task]:
        yield from zip(sample["arguments"], sample["resps"], strict=True)


def test_every_continuation_has_the_same_likelihood_through_transformers(answers):
    ours = list(responses(answers["ours"], "endings"))
    theirs = list(responses(answers["theirs"], "endings"))
    assert len(ours) == len(theirs) == 16
    for (asked, mine), (_, other) in zip(ours, theirs, strict=True):
        (a, greedy), (b, their_greedy) = mine[0], other[0]
        tokens = len(ByteTokenizer().encode(asked[1]))
        assert abs(float(a) - float(b)) <= 1e-5 * tokens, asked
        assert str(greedy) == str(their_greedy)


def test_every_result_of_every_kind_of_task_is_the_same(answers):
    ours, theirs = (answers[name]["results"] for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for task in ("endings", "writing"):
        kept = {k: v for k, v in ours[task].items() if not k.startswith("alias")}
        assert kept == {k: v for k, v in theirs[task].items() if k in kept}
    bits = [found["texts"]["bits_per_byte,none"] for found in (ours, theirs)]
    assert bits[0] == pytest.approx(bits[1], abs=2e-5)


def test_texts_are_continued_alike(answers):
    ours, theirs = (
        [resps for _, resps in responses(answers[name], "writing")] for name in ("ours", "theirs")
    )
    assert ours == theirs
    assert any(text[0][0] if isinstance(text[0], list) else text[0] for text in ours)


def test_end_of_a_text_is_scored_as_the_whole(run):
    model, _ = load_model(run)
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(1))
    nll = token_nll(model, ids, chunk_tokens=16)
    for count in (1, 15, 16, 17, 69):
        nats, _ = score_continuation(model, ids, count, chunk_tokens=16)
        assert nats == pytest.approx(float(nll[-count:].double().sum()), abs=1e-9)
    written = generate(model, [ids[:5].tolist()], Sampling(max_new_tokens=4))[0]
    assert score_continuation(model, torch.tensor([*ids[:5], *written]), 4)[1] is True
    wrong = [*ids[:5], *written[:3], (written[3] + 1) % 256]
    assert score_continuation(model, torch.tensor(wrong), 4)[1] is False


def test_command_adds_results_to_the_receipt(run, tasks, tmp_path, capsys, answers):
    words = [str(run), "--tasks", "endings,texts", "--include-path", str(tasks)]
    out = tmp_path / "new" / "results.json"
    assert command.main([*words, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    [entry] = json.loads((run / "receipt.json").read_text())["harness"]
    assert json.loads(out.read_text())["harness"] == [entry]
    assert entry["step"] == 10
    expected = answers["ours"]["results"]["endings"]["acc,none"]
    assert entry["results"]["endings"]["acc"] == expected
    assert f"acc                  {expected:.4f}" in told
    assert command.main([*words, "--limit", "2"]) == 0
    first, second = json.loads((run / "receipt.json").read_text())["harness"]
    assert (first["documents"]["endings"], second["documents"]["endings"]) == (4, 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "endigns", "--include-path", "{tasks}"], "did you mean endings?"),
        (["--tasks", "endings", "--include-path", "{tasks}/nothing"], "is no folder"),
        (["--tasks", "endings", "--limit", "0"], "--limit 0 must be 1 or more"),
        (["--tasks", ",", "--include-path", "{tasks}"], "--tasks ',' names no task"),
    ],
)
def test_what_cannot_be_is_one_line(words, told, run, tasks, capsys):
    assert command.main([str(run), *(word.format(tasks=tasks) for word in words)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.strip().startswith("error:") or error.count("error:") == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"doc_to_text": "{{nothing}}"}, {"doc_to_text": "{{text"}, {"doc_to_target": 9},
        {"metric_list": [{"metric": "beauty"}]}, {"test_split": "exam"}, {"colour": "red"},
        {"lines": '{"text": "a"'}, {"lines": ""},
    ],
    ids=str,
)  # fmt: skip
def test_a_task_that_cannot_be_read_is_one_line(fault, run, tasks, tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(fault.get("lines", (tasks / "lines.jsonl").read_text()))
    data = {"data_files": {"test": str(lines)}, "cache_dir": str(tmp_path / "c")}
    task = {"task": "mine", **COMMON, "dataset_kwargs": data, **TASKS["endings"]}
    task |= {key: value for key, value in fault.items() if key != "lines"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    before = (run / "receipt.json").read_bytes()
    assert command.main([str(run), "--tasks", "mine", "--include-path", str(tmp_path)]) == 2
    [error] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "--tasks mine" in error
    assert (run / "receipt.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "code", "told"),
    [
        (
            {"doc_to_target": "anwser"}, 2,
            ["doc_to_target: anwser is no column of it (did you mean answer?), so",
             "error: --tasks mine: doc_to_target: anwser gives 'anwser' for the first document, and"
             " for none of 4 an answer among its choices ["],
        ),
        ({"doc_to_target": "no {{text}}"}, 2, ["for none of 4 an answer among its choices"]),
        (
            {"doc_to_target": "{{9 if text|length > 45 else answer}}"}, 0,
            ["gives for 1 of 4 documents no answer among their choices: they count as wrong"],
        ),
        (  # of several answers the harness takes any
            {"doc_to_target": "{{[answer, 9]}}"}, 0, [],
        ),
        ({"doc_to_target": "{{[]}}"}, 2, ["for none of 4 an answer among its choices"]),
        ({"doc_to_text": "txet"}, 0, ["doc_to_text: txet is no column of it (did you mean text?)"]),
    ],
)  # fmt: skip
def test_what_a_task_names_and_has_not_is_told(
    changed, code, told, run, tasks, tmp_path, capsys, caplog
):
    """The harness takes the word for a text: accuracy 0, and exit code 0."""
    data = {"data_files": {"test": str(tasks / "lines.jsonl")}, "cache_dir": str(tmp_path / "c")}
    task = {"task": "mine", **COMMON, "dataset_kwargs": data, **TASKS["endings"], **changed}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))
    receipt = (run / "receipt.json").read_bytes()
    caplog.set_level("WARNING", logger="scripts.eval")
    try:
        words = [str(run), "--tasks", "mine", "--include-path", str(tmp_path)]
        assert command.main(words) == code
        ours = [r.getMessage() for r in caplog.records if r.name == "scripts.eval"]
        lines = [*ours, *capsys.readouterr().err.splitlines()]
        for part in told:
            assert sum(part in line for line in lines) == 1
        assert len(ours) == len(told) - (code and 1)
        assert ((run / "receipt.json").read_bytes() == receipt) == (code != 0)
    finally:
        (run / "receipt.json").write_bytes(receipt)


def test_a_task_that_scores_itself_need_not_name_an_answer(run, tasks, tmp_path, caplog):
    """As simple_cooccurrence_bias of the harness does, whose answer is the word "all"."""
    data = {"data_files": {"test": str(tasks / "lines.jsonl")}, "cache_dir": str(tmp_path / "c")}
    task = {"task": "mine", **COMMON, "dataset_kwargs": data, **TASKS["endings"]}
    task |= {"doc_to_target": "all", "metric_list": [{"metric": "spread", "aggregation": "mean"}]}
    text = yaml.safe_dump(task) + "process_results: !function scoring.spread\n"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "scoring.py").write_text(
        "def spread(doc, results):\n"
        "    nats = [nats for nats, _ in results]\n"
        "    return {'spread': max(nats) - min(nats)}\n"
    )
    caplog.set_level("WARNING", logger="scripts.eval")
    out = tmp_path / "out.json"
    words = [str(run), "--tasks", "mine", "--include-path", str(tmp_path), "--out", str(out)]
    receipt = (run / "receipt.json").read_bytes()
    try:
        assert command.main(words) == 0
    finally:
        (run / "receipt.json").write_bytes(receipt)
    [entry] = json.loads(out.read_text())["harness"]
    assert entry["results"]["mine"]["spread"] > 0
    assert [r for r in caplog.records if r.name == "scripts.eval"] == []


def test_a_fault_of_our_model_is_none_of_the_task(run, tasks, monkeypatch):
    def broken(*_, **__):
        raise ValueError("ours")

    monkeypatch.setattr("train.exchange.harness.score_continuation", broken)
    with pytest.raises(ValueError, match="ours"):
        command.main([str(run), "--tasks", "endings", "--include-path", str(tasks)])


def test_a_continuation_beyond_the_model_is_refused(pair):
    """Its beginning would be left out of the score; theirs refuses it by an assertion."""
    request = Instance("loglikelihood", {}, ("a", "bc " * 100), 0)
    with pytest.raises(UserError, match=r"300 tokens .* max_position_embeddings=256"):
        pair[0].loglikelihood([request], True)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("", "ab"), ("a ", "b"), ("abc " * 90, "the end"), ("a" * 20, "bc " * 82), ("x" * 253, "yz")],
)
def test_texts_at_the_edges_are_scored_alike(context, continuation, pair):
    """No context, a blank at its end, and texts beyond the 256 positions, which lose their head."""
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    (a, greedy), (b, their_greedy) = (lm.loglikelihood([request], True)[0] for lm in pair)
    assert abs(a - b) <= 1e-5 * (len(continuation) + 1)
    assert greedy == their_greedy
