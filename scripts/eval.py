"""Evaluate a model on tasks of lm-evaluation-harness, whose results others know.

The model may be a run, a checkpoint, a transformers folder or an official folder; a run's results
are added to its receipt. Tasks whose text is on no disk here are fetched by the harness, so they
need a network; tasks of one's own are a YAML and a JSONL file below --include-path.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import logging
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.model_options import add_model_options, open_model_source
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole
from train.errors import UserError, one_line
from train.record.receipt import HARNESS, RECEIPT, read_receipt
from train.record.receipt import write_json as write_receipt

log = logging.getLogger(__name__)
_MODEL = "train.exchange.harness"
EPILOG = """examples:
  v4 eval runs/v4_nano --tasks lambada_openai,arc_easy --limit 200
  v4 eval exported/nano --tasks mine --include-path tasks --out mine.json

a task of one's own, tasks/mine.yaml, beside a file of lines {"question", "choices", "answer"}:
  task: mine
  dataset_path: json
  dataset_kwargs: {data_files: {test: tasks/mine.jsonl}}
  test_split: test
  output_type: multiple_choice
  doc_to_text: "{{question}}"
  doc_to_choice: "{{choices}}"
  doc_to_target: answer
  metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@command(logging.INFO)
def main(words: Sequence[str] | None = None) -> None:
    """Evaluate."""
    evaluate(parse(words))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG, beyond="--tasks {}")
    add_model_options(parser)
    parser.add_argument("--tasks", required=True, help="names with commas; groups of tasks too")
    parser.add_argument("--include-path", type=Path, help="folder with tasks of one's own")
    parser.add_argument("--fewshot", type=whole(least=0), help="solved examples before each"
                        " (default: the task's own number)")  # fmt: skip
    parser.add_argument("--limit", type=whole(least=1), help="the first so many documents of a task"
                        " (default: all)")  # fmt: skip
    parser.add_argument(
        "--seed", type=whole(least=0), default=1234, help="of the choice of examples"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write the results to")
    return parser.read(words, _check_out, _check_include_path)


def _check_out(options: argparse.Namespace) -> None:
    if options.out is not None:
        check_output("--out", options.out, f'"{HARNESS}"')


def _check_include_path(options: argparse.Namespace) -> None:
    folder = options.include_path
    if folder is not None and not folder.is_dir():
        raise UserError(f"--include-path {folder} is no folder")


def evaluate(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        UserError: model or tasks cannot be read, or do not fit together.
    """
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise UserError(f"--tasks {options.tasks!r} names no task")
    tasks = _tasks(names, options.include_path)
    model, tokenizer, source = open_model_source(options)
    if tokenizer is None:
        raise UserError(f"{options.model} has no tokenizer, and tasks are texts")
    from train.exchange.harness import HarnessModel  # noqa: PLC0415  after _tasks has looked

    entry = {
        "step": source.provenance.step,
        "model": source.origin,
        "weights": options.weights,
        "precision": options.precision,
        "quant": options.quant,
        "fewshot": options.fewshot,
        "limit": options.limit,
        "seed": options.seed,
        **_run(HarnessModel(model, tokenizer, options.chunk_tokens), names, tasks, options),
    }
    for line in _table(entry["results"]):
        print(line)
    if options.out is not None:
        write_json(options.out, {HARNESS: [entry]})
    if source.provenance.run:
        _add_to_receipt(options.model, entry)


def _tasks(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's list of tasks, in which all names stand.

    Raises:
        UserError: the package is not there, or a name is not.
    """
    try:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415  optional package
    except ImportError as error:
        raise UserError(
            "v4 eval needs lm-evaluation-harness: pip install 'v4-pretrain[eval]'"
        ) from error
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        unknown = [name for name in names if name not in own.all_tasks]
        if not unknown:
            return own  # the list of all others takes seconds to read
        if near := difflib.get_close_matches(unknown[0], own.all_tasks, 1, cutoff=0.8):
            raise UserError(f"--tasks {unknown[0]} is no task: did you mean {near[0]}?")
    tasks = TaskManager(include_path=str(folder) if folder is not None else None)
    for name in names:
        if name not in tasks.all_tasks:
            near = difflib.get_close_matches(name, tasks.all_tasks, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"--tasks {name} is no task of lm-evaluation-harness{hint}")
    return tasks


def _run(
    model: Any, names: Sequence[str], tasks: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """Results and versions, by task.

    Raises:
        UserError: the text of a task cannot be had.
    """
    import lm_eval  # noqa: PLC0415  optional package

    evaluate: Any = lm_eval.simple_evaluate
    try:
        loaded = tasks.load(list(names))
        for name, task in loaded["tasks"].items():
            _check_answers(name, task, options.limit)
        inside = {child for children in loaded["group_map"].values() for child in children}
        asked = [x for n, x in {**loaded["groups"], **loaded["tasks"]}.items() if n not in inside]
        found = evaluate(
            model=model, tasks=asked, task_manager=tasks, num_fewshot=options.fewshot,
            limit=options.limit, bootstrap_iters=0, fewshot_random_seed=options.seed,
            log_samples=False,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        if _in_our_model(error):
            raise
        # Of the task: no file, no network, a line or a template that cannot be, ...
        told = one_line(error) or "no text"
        raise UserError(f"--tasks {options.tasks}: {type(error).__name__}: {told}") from error
    return {
        "harness_version": lm_eval.__version__,
        "versions": {name: found["versions"].get(name) for name in found["results"]},
        "documents": {name: n["effective"] for name, n in found["n-samples"].items()},
        "results": {name: dict(_numbers(values)) for name, values in found["results"].items()},
    }


def _check_answers(name: str, task: Any, limit: int | None) -> None:
    """Tell of what a task names and does not have: the harness takes such a word for a text.

    Raises:
        UserError: no document's answer is among its choices, so that all would count as wrong.
    """
    columns = getattr(task, "features", ())
    scores_itself = callable(task.config.process_results)  # and may never read the answer
    for key in ("doc_to_text",) if scores_itself else ("doc_to_text", "doc_to_target"):
        word = getattr(task.config, key)
        if isinstance(word, str) and word.isidentifier() and word not in columns:
            near = difflib.get_close_matches(word, columns, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            log.warning(
                "--tasks %s: %s: %s is no column of it%s, so every document has this word there",
                name, key, word, hint,
            )  # fmt: skip
    if task.OUTPUT_TYPE != "multiple_choice" or scores_itself:
        return
    documents = list(itertools.islice(task.eval_docs, limit))
    wrong = sum(not _is_answered(task, document) for document in documents)
    key = "doc_to_text" if task.multiple_input else "doc_to_target"
    said = f"--tasks {name}: {key}: {getattr(task.config, key)}"
    if documents and wrong == len(documents):
        raise UserError(
            f"{said} gives {_answer(task, documents[0])!a} for the first document, and for none of"
            f" {wrong} an answer among its choices {task.doc_to_choice(documents[0])!a}"[:600]
        )
    if wrong:
        log.warning(
            "%s gives for %d of %d documents no answer among their choices: they count as wrong",
            said, wrong, len(documents),
        )  # fmt: skip


def _answer(task: Any, document: Any) -> Any:
    """Of a multiple choice: a place, a text, or several of either."""
    return (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)


def _is_answered(task: Any, document: Any) -> bool:
    """Whether some choice counts as right: of several answers the harness takes any."""
    answer, choices = _answer(task, document), task.doc_to_choice(document)
    answers = answer if isinstance(answer, list) else [answer]
    return any(
        0 <= one < len(choices) if isinstance(one, int) else one in choices for one in answers
    )


def _in_our_model(error: BaseException) -> bool:
    """Whether an error came out of the model, and not out of the harness's reading of a task."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == _MODEL for frame, _ in frames)


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Metrics without the standard errors, which were not asked for."""
    for key, value in values.items():
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if is_number and key != "sample_len" and "_stderr" not in key:
            yield key.removesuffix(",none"), float(value)


def _table(results: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    width = max(map(len, results), default=0)
    for task, values in sorted(results.items()):
        for name, value in sorted(values.items()):
            yield f"{task:{width}}  {name:20} {value:.4f}"


def _add_to_receipt(path: Path, entry: Mapping[str, Any]) -> None:
    """Add results to the receipt of the run that a path means."""
    folder = path if (path / RECEIPT).is_file() else path.absolute().parents[1]
    receipt = read_receipt(folder)
    if not receipt:
        log.warning("%s has left no %s yet: the results stand here alone", path, RECEIPT)
        return
    write_receipt(folder / RECEIPT, {**receipt, HARNESS: [*receipt.get(HARNESS, []), dict(entry)]})
    print(f"added to {folder / RECEIPT}")


if __name__ == "__main__":
    sys.exit(main())
