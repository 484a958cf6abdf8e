"""The cache: complete or absent, built once by however many processes, also after a kill."""

import os
import threading
import time

import numpy as np
import pytest

from data.cache import build_once, locked, save_array
from data.errors import ConfigError
from tests.helpers import warm_context

pytestmark = pytest.mark.core


def slow_build(folder):
    with (folder.parent / "builds").open("a") as log:
        log.write("x")
    (folder / "first").write_text("1")
    time.sleep(0.3)
    (folder / "second").write_text("2")


def build_and_check(target) -> None:
    folder = build_once(target, slow_build)
    assert (folder / "second").read_text() == "2"


def test_processes_that_ask_at_once_build_once(tmp_path):
    context = warm_context()
    processes = [context.Process(target=build_and_check, args=(tmp_path / "x",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["builds", "x"]


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    def dies(folder):
        (folder / "first").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "x", dies)
    assert not (tmp_path / "x").exists()

    def sees(folder):
        (folder / "found").write_text(str(sorted(os.listdir(folder))))

    assert (build_once(tmp_path / "y", sees) / "found").read_text() == "[]"
    (tmp_path / "z.partial").mkdir()
    (tmp_path / "z.partial" / "old").touch()
    kept = build_once(tmp_path / "z", sees, resume="*.json")
    assert sorted(p.name for p in kept.iterdir()) == ["found", "old"]
    assert sorted(p.name for p in build_once(tmp_path / "x", sees).iterdir()) == ["found"]


@pytest.mark.parametrize("resume", ["", "*.json"])
def test_a_build_that_is_refused_leaves_nothing_of_its_own(tmp_path, resume):
    def refuses(folder):
        (folder / "shard").write_text("1")
        raise ConfigError("the text cannot be")

    with pytest.raises(ConfigError, match="the text cannot be"):
        build_once(tmp_path / "x", refuses, resume)
    assert list(tmp_path.iterdir()) == []

    begun = tmp_path / "x.partial"
    begun.mkdir()
    (begun / "earlier").write_text("hours of work")
    with pytest.raises(ConfigError):
        build_once(tmp_path / "x", refuses, resume)
    assert begun.exists() == bool(resume)


@pytest.mark.parametrize("resume", ["", "*.json"])
def test_a_fault_told_as_a_refusal_leaves_what_is_finished(tmp_path, resume):
    """As a network that fails once, at nine tenths of the source."""
    fails = [True]

    def build(folder):
        (folder / f"{len(list(folder.iterdir()))}.json").write_text("a finished part")
        if fails and fails.pop():
            raise ConfigError("the source cannot be read")

    with pytest.raises(ConfigError, match="cannot be read"):
        build_once(tmp_path / "x", build, resume)
    assert len(list(build_once(tmp_path / "x", build, resume).iterdir())) == (2 if resume else 1)


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path):
    """Of two that wait while a build is refused, the second must not hold another file."""
    held = []
    threads = []

    def holds():
        with locked(tmp_path / "x", "key"):
            held.append(1)
            assert sum(held) == 1
            time.sleep(0.05)
            held.append(-1)

    with locked(tmp_path / "x", "key"):
        threads.append(threading.Thread(target=holds))
        threads[0].start()
        time.sleep(0.1)  # it waits for the file that goes
        (tmp_path / ".x.lock").unlink()
        threads.append(threading.Thread(target=holds))
        threads[1].start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert held == [1, -1, 1, -1]


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir: cannot write to .*file"):
        build_once(tmp_path / "file" / "x", slow_build)


@pytest.mark.parametrize(
    "array", [np.arange(7, dtype=np.uint16), np.empty((0, 3)), np.eye(3).T[1:]]
)
def test_save_array_writes_what_numpy_writes(tmp_path, array):
    save_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
