"""Random damage to a folder of checkpoints: the newest whole one is found, or none; one line else.

Oracle: a checkpoint is whole if every file that was written reads back as the same bytes under its
folder's own name. What is whole stays so, to the byte. The same examples in every run of the short
test; the slow one is the same with many more.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from scripts.checkpoints import main
from tests.train.checkpoint.folders import locate, newest_good
from train.checkpoint import manager as checkpoint
from train.checkpoint.files import describe_file, seal, step_of
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import Retention, published
from train.errors import UserError

STEPS = (1, 2, 3)
FILES = (".metadata", "__0_0.distcp", "manifest.json", "state.json")
JSON = ("", "{}", "[]", "null", "0", '"x"', "[" * 100_000, '{"step": NaN}', "\ud800", "{")
WRONG = (None, True, -1, 1.5, "x\ny", [], [1], {}, {"a": None}, 10**400, "1")


def name_of(step):
    return f"step_{step:08d}"


def state_of(step):
    progress = {"step": step, "tokens": 5, "skipped_steps": 0}
    state = {key: {} for key in ("loader", "recovery", "trackers", "identity")}
    return {"progress": progress, "val_loss": 1.5, **state}


def get(path):
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(path)
    return path.read_bytes()


def put(path, content):
    get(path)
    path.write_bytes(content)


# ---- damages: each takes the folder of checkpoints, a step, a file's name and a number -----------
def truncate(folder, step, file, number):
    path = folder / name_of(step) / file
    content = get(path)
    put(path, content[: number % max(len(content), 1)])


def flip(folder, step, file, number):
    path = folder / name_of(step) / file
    content = bytearray(get(path))
    content[number % len(content)] ^= 1 << number % 8
    put(path, content)


def insert(folder, step, file, number):
    path = folder / name_of(step) / file
    content = bytearray(get(path))
    content.insert(number % (len(content) + 1), number % 256)
    put(path, content)


def delete(folder, step, file, number):
    (folder / name_of(step) / file).unlink()


def delete_folder(folder, step, file, number):
    shutil.rmtree(folder / name_of(step))


def swap(folder, step, file, number):
    one = folder / name_of(step) / file
    other = folder / name_of(STEPS[number % 3]) / FILES[number % 4]
    first, second = get(one), get(other)
    put(one, second)
    put(other, first)


def swap_folders(folder, step, file, number):
    one, other = folder / name_of(step), folder / name_of(STEPS[number % 3])
    one.rename(folder / "aside")
    if other.exists():
        other.rename(one)
    (folder / "aside").rename(other)


def rename(folder, step, file, number):
    names = (name_of(7), name_of(0), "step_3", "step_000000003", "aside", ".writing_step_00000003")
    (folder / name_of(step)).rename(folder / names[number % len(names)])


def other_json(folder, step, file, number):
    text = JSON[number % len(JSON)]
    put(folder / name_of(step) / file, text.encode("utf-8", "surrogatepass"))


def wrong_state(folder, step, file, number):
    """A type that is never written, and hashes that fit."""
    path = folder / name_of(step)
    state = json.loads(get(path / "state.json"))
    keys = ("step", "progress", "loader", "recovery", "trackers", "val_loss", "identity")
    key, value = keys[number % len(keys)], WRONG[number % len(WRONG)]
    if key == "step" or (number % 2 and key == "progress"):
        inside = state if key == "step" else state["progress"]
        inside["step"] = value
    elif isinstance(value, dict) or (key == "val_loss" and value in (None, 1.5, -1, 10**400)):
        value = "x"
        state[key] = value
    else:
        state[key] = value
    reseal(path, state if number % 3 else list(state))


def wrong_manifest(folder, step, file, number):
    path = folder / name_of(step) / "manifest.json"
    manifest, value = json.loads(get(path)), WRONG[number % len(WRONG)]
    places = (manifest, manifest["files"], manifest["files"].get(file, manifest))
    place = places[number % 3]
    place[sorted(place)[number % len(place)]] = value
    if number % 5 == 0:
        manifest["files"][f"{value}"] = manifest["files"].pop(file)
    path.write_text(seal(manifest))


def reseal(path, state):
    """Another state, with the hashes of it."""
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads(get(path / "manifest.json"))
    manifest["files"]["state.json"] = describe_file(path / "state.json")
    (path / "manifest.json").write_text(seal(manifest))


def extra_file(folder, step, file, number):
    names = ("__1_0.distcp", ".nfs0001", "notes.txt", "manifest.json.bak", "deep")
    path = folder / name_of(step) / names[number % len(names)]
    path.mkdir() if path.name == "deep" else path.write_text("not of the checkpoint")


def extra_entry(folder, step, file, number):
    names = (name_of(8), "damaged_step_00000001", "abandoned_step_00000009", ".removing_x", "notes")
    path = folder / names[number % len(names)]
    (path.write_text, lambda _: path.mkdir())[number % 2]("")


def link_file(folder, step, file, number):
    """To itself, to nowhere, to another checkpoint's, or to a copy of itself."""
    path = folder / name_of(step) / file
    copy = folder / "elsewhere"
    copy.write_bytes(get(path))
    path.unlink()
    other = folder / name_of(STEPS[number % 3]) / file
    path.symlink_to((path, Path("nowhere"), other, copy)[number % 4])


def link_folder(folder, step, file, number):
    path = folder / name_of(step)
    path.rename(folder / "moved")
    path.symlink_to((folder / "moved", Path("nowhere"), path)[number % 3])


def file_to_folder(folder, step, file, number):
    path = folder / name_of(step) / file
    path.unlink()
    path.mkdir()


def folder_to_file(folder, step, file, number):
    path = folder / name_of(step)
    shutil.rmtree(path)
    path.write_text("")


def pipe(folder, step, file, number):
    path = folder / name_of(step) / file
    path.unlink()
    os.mkfifo(path)


def forbid(folder, step, file, number):
    path = folder / name_of(step)
    (path if number % 2 else path / file).chmod(0)


DAMAGES = (
    truncate, flip, insert, delete, delete_folder, swap, swap_folders, rename, other_json,
    wrong_state, wrong_manifest, extra_file, extra_entry, link_file, link_folder, file_to_folder,
    folder_to_file, pipe, forbid,
)  # fmt: skip
ONE = st.tuples(
    st.sampled_from(DAMAGES), st.sampled_from(STEPS), st.sampled_from(FILES), st.integers(0, 9999)
)


# ---- the oracle ----------------------------------------------------------------------------------
def content_of(folder):
    """Bytes of the files that were written, as far as they can be read."""
    found = {}
    for name in FILES:
        path = folder / name
        with contextlib.suppress(OSError):
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def whole(folder, pristine):
    found = {
        step: path
        for step in STEPS
        if (path := folder / name_of(step)).is_dir() and content_of(path) == pristine[step]
    }
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for step in STEPS:
        tensors = {"model.a": torch.full((4, 3), float(step)), "optim.a.step": torch.tensor(step)}
        Checkpoints(folder).save(step, tensors, state_of(step))
    return folder


@contextlib.contextmanager
def damaged(source, damages):
    """A run folder whose checkpoints met all this; a damage that cannot be done is left out."""
    with tempfile.TemporaryDirectory() as run:
        folder = Path(run, "checkpoints")
        shutil.copytree(source, folder)
        for damage, step, file, number in damages:
            try:
                damage(folder, step, file, number)
                event(damage.__name__)
            except Exception:  # of what an earlier damage left
                event(f"not done: {damage.__name__}")
        yield folder
        for path in (folder, *folder.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o700)


class Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def check(source, damages):
    pristine = {step: content_of(source / name_of(step)) for step in STEPS}
    log, lines = logging.getLogger("train"), Lines()
    log.addHandler(lines)
    try:
        with damaged(source, damages) as folder:
            good = whole(folder, pristine)
            newest = list(good.values())[-1] if good else None
            event(f"{len(good)} whole")
            check_reading(folder, newest)
            check_script(folder, good)
            assert whole(folder, pristine) == good, "looking is touching"
            check_saving(folder, pristine, good)
    finally:
        log.removeHandler(lines)
    assert [line for line in lines.lines if "\n" in line] == []


def line_of(look):
    """What ``look`` returns, and the one line of its error."""
    try:
        return look(), ""
    except UserError as error:
        return None, str(error)


def check_reading(folder, newest):
    assert newest_good(Checkpoints(folder)) == newest
    found, line = line_of(lambda: locate(str(folder.parent)))
    assert found == newest
    assert (not line) == bool(newest)
    assert "\n" not in line
    for path in published(folder):
        _, line = line_of(lambda path=path: checkpoint.hold_together(path).close())
        assert not line or str(path) in line
        assert "\n" not in line


def check_script(folder, good):
    run = str(folder.parent)
    for words, codes in (
        (["list", run], {0, 2}),
        (["verify", run], {0, 1, 2}),
        (["show", run], {0} if good else {2}),
        (["prune", run, "--last", "1"], {0, 2}),
    ):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        assert code in codes, (words, code, err.getvalue())
        assert err.getvalue().count("\n") == (code == 2), err.getvalue()
        if words[0] == "verify" and code != 2:
            assert out.getvalue().count("whole    ") == len(good)


def check_saving(folder, pristine, good):
    run = Checkpoints(folder, Retention(last=2))
    run.clean()
    run.save(9, {"model.a": torch.zeros(2)}, state_of(9))
    kept = dict(list(good.items())[-1:])
    assert whole(folder, pristine).items() >= kept.items(), "the newest good one stays"
    again = Checkpoints(folder)
    assert newest_good(again) == folder / name_of(9)
    assert newest_good(again, upto=3) == next(iter(kept.values()), None)
    assert {step_of(path) for path in published(folder)} >= {9, *kept}


FEW = settings(
    max_examples=25, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@FEW
@example(damages=[(wrong_manifest, 3, ".metadata", 9497)])  # a hash of two lines
@example(damages=[(wrong_manifest, 3, "__0_0.distcp", 510)])  # a file's name of two lines
@given(damages=st.lists(ONE, min_size=1, max_size=4))
def test_newest_whole_checkpoint_is_found_after_any_damage(source, damages):
    check(source, damages)


@pytest.mark.slow
@settings(FEW, max_examples=1000)
@given(damages=st.lists(ONE, min_size=1, max_size=8))
def test_newest_whole_checkpoint_is_found_after_much_damage(source, damages):
    check(source, damages)
