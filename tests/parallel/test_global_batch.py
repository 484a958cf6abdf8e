"""The global batch is the config's, however many ranks share it and whoever resumes whom.

Every step has the same rows in the same order for every number of data ranks; a job that goes on
with another number of ranks reads every row of an epoch once. Bound: equality.
"""

import json
from itertools import pairwise

import pytest
import torch

from data.loader import build_loader
from data.prepare import build_tokenizer
from tests.integration.small_run import ROWS, SEQ_LEN, small_run, write_corpus
from train.stages import check_rows, resolve
from train.step import microbatches, plan_step

NUM_ROWS = 2 * ROWS  # divides by 8 ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One row a microbatch, so that the batch splits over as many ranks as it has rows."""
    folder = tmp_path_factory.mktemp("rows")
    run = small_run(folder / "run", write_corpus(folder), steps=1000, micro_batch_size=1,
                    global_batch_tokens=NUM_ROWS * SEQ_LEN)  # fmt: skip
    run.data.sources["words"].path = str(folder / "corpus.jsonl")
    return run


def loader_of(run):
    return build_loader(run.data, build_tokenizer(run.data), run.seed, 2)


def rows_of_step(run, loader, number, degree):
    """Rows [rows, T, 2] of ids and document ids, rank after rank, as each rank reads its own."""
    plan = resolve(run)
    check_rows(plan, degree)
    step = plan_step(number, (number - 1) * NUM_ROWS * SEQ_LEN, plan, run.train, run.optim)
    rows = loader.plan(step.num_rows, step.stage.seq_len)
    return torch.cat(
        [
            torch.stack([batch.input_ids_BT, batch.document_ids_BT], dim=-1)
            for rank in range(degree)
            for batch in microbatches(
                rows, step.num_rows, step.stage.micro_batch_size, rank, degree
            )
        ]
    )


@pytest.mark.core
def test_every_number_of_ranks_trains_the_configured_batch(run):
    loaders = {degree: loader_of(run) for degree in (1, 2, 4, 8)}
    for number in range(1, 6):
        rows = {d: rows_of_step(run, loader, number, d) for d, loader in loaders.items()}
        assert rows[1].shape == (run.train.global_batch_tokens // SEQ_LEN, SEQ_LEN, 2)
        assert all(torch.equal(rows[1], other) for other in rows.values())


@pytest.mark.core
def test_no_row_of_an_epoch_is_skipped_or_repeated_when_ranks_change(run):
    """4 ranks, then 1, 2, 8 and 4 again, each from the state that the one before saved."""
    straight, loader = loader_of(run), loader_of(run)
    stored = loader.manifest["sources"]["words"]["tokens"]
    expected, found, number, tokens = [], [], 0, 0
    degrees = (4, 1, 2, 8, 4)
    while loader.position.epoch == 0:
        degree = degrees[number // 8 % len(degrees)]
        if number and number % 8 == 0:
            state = json.loads(json.dumps(loader.state_dict()))
            loader = loader_of(run)
            loader.load_state_dict(state)
        number += 1
        expected.append(rows_of_step(run, straight, number, 1))
        found.append(rows_of_step(run, loader, number, degree))
    assert number > 8 * len(degrees)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    rows = torch.cat(found)
    for row in rows:  # the epoch ends inside the last step
        if tokens == stored:
            break
        tokens += int((row[:, 1] >= 0).sum())
    assert tokens == stored


@pytest.mark.core
def test_batch_that_ranks_cannot_share_is_refused_not_changed(run):
    for degree, more in pairwise((1, 2, 4, 8, 16)):
        check_rows(resolve(run), degree)
        if more == 16:
            with pytest.raises(ValueError, match=r"a batch of 8 rows .* 16 data rank"):
                check_rows(resolve(run), more)
