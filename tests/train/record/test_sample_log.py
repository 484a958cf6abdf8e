"""``train.log_samples``: what ranks read, over kills and rollbacks; a row read wrongly is found."""

import logging

import pytest

from data.global_batch import Sample
from tests.integration.small_run import KillAfter, Killed, fit, small_run, write_corpus
from tests.train.samples import every_token_once, read_samples
from train.build import build
from train.record.sample_log import SampleLogError, _merged

pytestmark = pytest.mark.core

A, B, C = ([Sample("words", number, 0, 0, 9)] for number in range(3))
STEPS = 40  # two passes and a bit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=3)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(logged_run(folder, corpus))
    return folder


def logged_run(folder, corpus, **train):
    run = small_run(folder, corpus, STEPS, log_samples=True, eval_every=0, eval_tokens=0, **train)
    run.data.validation.bytes = 0
    return run


def test_every_token_of_a_pass_is_read_once(whole):
    every_token_once(whole, epochs=2)


def test_killed_run_logs_what_the_undisturbed_one_does(corpus, whole, tmp_path):
    run = logged_run(tmp_path / "run", corpus, checkpoint_every=15)
    for step in (22, 40):
        trainer = build(run)
        trainer.recorder.trackers.append(KillAfter(step))
        with pytest.raises(Killed):
            trainer.fit()
    fit(run)
    assert read_samples(tmp_path / "run") == read_samples(whole)


def test_it_is_off_unless_asked_for_and_may_begin_later(corpus, tmp_path, caplog):
    run = logged_run(tmp_path / "run", corpus, checkpoint_every=2)
    run.train.log_samples, run.train.steps = False, 2
    fit(run)
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    run.train.log_samples, run.train.steps = True, 4
    with caplog.at_level(logging.WARNING):
        fit(run)
    assert "samples.jsonl ends with step 0, the checkpoint is of step 2" in caplog.text
    assert [line["step"] for line in read_samples(tmp_path / "run")] == [3, 4]


def test_stages_of_a_share_are_one_reading():
    shares = [(0, [0, 1], [A, B]), (0, [0, 1], [A, B]), (1, [2], [C]), (1, [2], [C])]
    assert _merged(1, 3, shares) == [A, B, C]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([(0, [0, 1], [A, B]), (1, [1], [B])], r"step 5 of 3 rows: read were \[0, 1, 1\]"),
        ([(0, [0, 1], [A, B])], r"step 5 of 3 rows: read were \[0, 1\]"),
        ([(0, [0, 1], [A, B]), (0, [0, 2], [A, C]), (1, [2], [C])], r"share 0 read rows"),
        ([(0, [0, 1], [A, B]), (0, [0, 1], [A, C]), (1, [2], [C])], r"share 0 read rows"),
    ],
)
def test_row_read_twice_or_never_or_differently_is_an_error(shares, message):
    with pytest.raises(SampleLogError, match=message):
        _merged(5, 3, shares)
