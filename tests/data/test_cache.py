"""The cache: complete or absent, built once by however many processes, also after a kill."""

import os
import time

import numpy as np
import pytest

from data.cache import build_once, save_array
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
    kept = build_once(tmp_path / "z", sees, resume=True)
    assert sorted(p.name for p in kept.iterdir()) == ["found", "old"]
    assert sorted(p.name for p in build_once(tmp_path / "x", sees).iterdir()) == ["found"]


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
