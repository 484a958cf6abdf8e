"""A run that meets poisoned batches and rolls back ends as one that never met them.

Real text: docstrings of Python's standard library, in documents of about one step each, read in
order; seven documents in a row are random characters. Measured is the validation loss after the
same number of steps. Its noise is that of clean runs that differ in their seed. Bound: 3 of their
standard deviations around their mean. What the poison does without recovery is seen on the
documents right behind it, which are the same in both runs; the small model forgets it within steps,
so the final loss need not show it.
"""

import ast
import json
import random
import statistics
import sysconfig
from pathlib import Path

import pytest

from tests.integration.small_run import fit, metrics_of
from train.config.command_line import compose_run
from train.errors import ExitCode

STEPS, DOCUMENTS, BYTES = 120, 200, 500
POISON = range(70, 77)
SEEDS = (1, 2, 3, 4)
RECOVERS = ["train.recovery.on_spike=rollback", "train.recovery.anticipatory_steps=10"]
GARBAGE = "".join(chr(c) for c in range(33, 97))  # no small letters


def docstrings():
    """All of the standard library's, cut into equal pieces."""
    text = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text.append(ast.get_docstring(node) or "")
    whole = "\n\n".join(text)
    whole = "".join(c for c in whole if c.isascii())
    return [whole[at : at + BYTES] for at in range(0, DOCUMENTS * BYTES, BYTES)]


def write(path, poisoned):
    """The poison lies between the documents of the clean file."""
    rng, documents = random.Random(0), docstrings()
    assert len(documents) == DOCUMENTS
    assert len(documents[-1]) == BYTES
    if poisoned:
        garbage = ["".join(rng.choices(GARBAGE, k=BYTES)) for _ in POISON]
        documents[POISON.start : POISON.start] = garbage
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def run_on(corpus, folder, seed, recovers=False):
    run = compose_run(
        [
            "model=v4_tiny", "data=jsonl", f"data.sources.jsonl.path={corpus}",
            "data.sources.jsonl.streaming=true", "data.tokenizer=byte",
            "data.packing.pool_documents=1", "data.validation.bytes=8000",
            "data.validation.max_overlap=1", f"data.cache_dir={folder.parent / 'cache'}",
            f"train.steps={STEPS}", "train.eval_tokens=6144", "train.checkpoint_every=10",
            "train.monitor_every=0", "train.device=cpu", "sample.tokens=0", f"seed={seed}",
            f"run_dir={folder}", "train.recovery.window=16",
            *(RECOVERS if recovers else []),
        ]
    )  # fmt: skip
    assert fit(run)[0] == ExitCode.finished
    return metrics_of(run)


def behind_the_poison(records):
    """Mean training loss of the three steps behind the last garbage, on which a loss is above 5.

    The recovered run meets some as well: fewer than ``patience`` are left behind its last rollback.
    """
    last = max(at for at, record in enumerate(records) if record["loss"] > 5 and at > 20)
    return statistics.mean(record["loss"] for record in records[last + 1 : last + 4])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_recovered_run_ends_within_the_noise_of_clean_ones(tmp_path):
    clean_file = write(tmp_path / "clean.jsonl", poisoned=False)
    bad_file = write(tmp_path / "poisoned.jsonl", poisoned=True)
    recovered = run_on(bad_file, tmp_path / "recovered", 0, recovers=True)
    unrecovered = run_on(bad_file, tmp_path / "unrecovered", 0)
    clean = [run_on(clean_file, tmp_path / f"clean{seed}", seed) for seed in SEEDS]
    losses = [records[-1]["val_loss"] for records in clean]
    mean, noise = statistics.mean(losses), statistics.stdev(losses)
    told = {"recovered": recovered[-1]["val_loss"], "unrecovered": unrecovered[-1]["val_loss"]}
    print(f"clean {losses}: {mean:.4f} +- {noise:.4f}; {told}")  # noqa: T201
    spikes = [records[-1]["loss_spikes"] for records in (recovered, unrecovered, *clean)]
    print(f"spikes {spikes}, rollbacks {recovered[-1]['rollbacks']}")  # noqa: T201
    assert recovered[-1]["rollbacks"] > 0
    assert spikes[2:] == [0] * len(SEEDS)
    assert told["recovered"] == pytest.approx(mean, abs=3 * noise)
    behind = [behind_the_poison(records) for records in (recovered, unrecovered)]
    print(f"behind the poison: recovered {behind[0]:.4f}, unrecovered {behind[1]:.4f}")  # noqa: T201
    assert behind[0] < behind[1]
