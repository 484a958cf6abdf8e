"""Damaged model folders and receipts: one line and exit code 2, or the right result.

Each case changes one file of a good folder by its number alone. What is still taken must give the
very tensors of the undamaged folder: no change here touches a tensor's bytes.
"""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from scripts import export_hf, report
from tests.train.exchange.exchange_models import write_run
from train.exchange.export import ExportFormat, ExportJob, FloatType, export_folder
from train.exchange.open import open_source
from train.record.receipt import config_hash, plain
from train.run_folder.folder import read_run

VALUES = [
    None, True, 0, -1, 3, 2**70, 10**400, 1e300, 0.5, "", "x", "\ud800", "F32", "F8_E4M3", [], {},
    [[]], ["</s>"], {"a": 1}, [1, 2], [None],
]  # fmt: skip
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"NaN", b'{"a": Infinity}', b"[" * 100_000, b"7"]
LAYOUTS = list(ExportFormat)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model in every layout, and what each gives when it is exported once more."""
    place = tmp_path_factory.mktemp("models")
    write_run(place / "run")
    for layout in LAYOUTS:
        job = ExportJob(layout, FloatType.fp32, shard_bytes=1 << 20)
        export_folder(open_source(place / "run"), place / layout.value, job)
        again = [str(place / layout.value), str(place / f"{layout.value} again")]
        assert export_hf.main([*again, "--to", "official", "--dtype", "fp32"]) == 0
    return place


def tensors(folder):
    return {k: v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}


def places(tree, path=()):
    """Paths of all values in a JSON tree, its own among them."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*path, key))


def changed_tree(tree, rng):
    """One value replaced, removed, or given another key."""
    tree = copy.deepcopy(tree)
    *path, key = rng.choice([p for p in places(tree) if p])
    inner = tree
    for part in path:
        inner = inner[part]
    kind = rng.choice(("replace", "replace", "remove", "rename"))
    if kind == "replace" or isinstance(inner, list):
        inner[key] = rng.choice(VALUES)
    else:
        value = inner.pop(key)
        if kind == "rename":
            inner[rng.choice(("x", f"{key}.", rng.choice([*inner, "y"])))] = value
    return tree


def changed_json(content, rng):
    if rng.random() < 0.25:
        return rng.choice(TEXTS)
    if rng.random() < 0.1:
        return content[: rng.randrange(len(content))]
    return json.dumps(changed_tree(json.loads(content), rng)).encode()


def changed_shard(content, rng):
    """The header alone: its length, its bytes, or its JSON."""
    size = int.from_bytes(content[:8], "little")
    kind = rng.choice(("length", "cut", "byte", "json", "json", "json"))
    if kind == "length":
        return rng.choice((0, 7, size - 1, size + 1, 2**40, 2**64 - 1)).to_bytes(
            8, "little"
        ) + content[8:]  # fmt: skip
    if kind == "cut":
        return content[: rng.randrange(8 + size)]
    if kind == "byte":
        at = 8 + rng.randrange(size)
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    header = json.dumps(changed_tree(json.loads(content[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def ended(code, capsys):
    """A command ended well, or by one line."""
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1)), lines
    assert len([line for line in lines if not line.startswith("WARNING")]) == len(errors), lines
    return code


def fuzz_folder(number, folders, place, capsys):
    rng = random.Random(number)
    layout = LAYOUTS[number % len(LAYOUTS)].value
    shutil.copytree(folders / layout, place / "in")
    path = rng.choice(sorted(p for p in (place / "in").iterdir() if p.suffix != ".md"))
    change = changed_shard if path.suffix == ".safetensors" else changed_json
    path.write_bytes(change(path.read_bytes(), rng))
    words = [str(place / "in"), str(place / "out"), "--to", "official", "--dtype", "fp32"]
    if ended(export_hf.main(words), capsys):
        assert not (place / "out").exists(), "what is refused leaves nothing"
        return
    found, expected = tensors(place / "out"), tensors(folders / f"{layout} again")
    assert found.keys() == expected.keys(), path.name
    assert all(torch.equal(found[name], expected[name]) for name in found), path.name


@pytest.mark.parametrize("number", range(24))
def test_a_damaged_model_folder_is_refused_or_read_right(number, folders, tmp_path, capsys):
    fuzz_folder(number, folders, tmp_path, capsys)


@pytest.mark.slow
def test_many_damaged_model_folders(folders, tmp_path, capsys):
    for number in range(24, 1024):
        (tmp_path / str(number)).mkdir()
        fuzz_folder(number, folders, tmp_path / str(number), capsys)
        shutil.rmtree(tmp_path / str(number))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished runs, as a comparison reads them."""
    place = tmp_path_factory.mktemp("finished")
    write_run(place / "a")
    shutil.rmtree(place / "a" / "checkpoints")
    run = read_run(place / "a")
    metrics = {"step": 10, "loss": 2.0, "val_loss": 2.5, "val_bits_per_byte": 1.9}
    receipt = {
        "config_sha256": config_hash(run), "finished": True, "progress": {"step": 10},
        "code": {"source_sha256": "0" * 64, "commit": None}, "final_metrics": metrics,
        "data": {"sources": {"t": {"tokens": 5}}}, "layout": plain(run.parallel),
        "environment": {"libraries": {"torch": "2"}},
    }  # fmt: skip
    (place / "a" / "receipt.json").write_text(json.dumps(receipt))
    shutil.copytree(place / "a", place / "b")
    return place


def fuzz_receipt(number, finished, place, capsys):
    rng = random.Random(number)
    shutil.copytree(finished, place / "in")
    path = place / "in" / rng.choice("ab") / "receipt.json"
    path.write_bytes(changed_json(path.read_bytes(), rng))
    words = [str(place / "in" / "a"), str(place / "in" / "b"), "--out", str(place / "out")]
    ended(report.main(words), capsys)


@pytest.mark.parametrize("number", range(12))
def test_a_damaged_receipt_is_refused_or_read(number, finished, tmp_path, capsys):
    fuzz_receipt(number, finished, tmp_path, capsys)


@pytest.mark.slow
def test_many_damaged_receipts(finished, tmp_path, capsys):
    for number in range(12, 1012):
        (tmp_path / str(number)).mkdir()
        fuzz_receipt(number, finished, tmp_path / str(number), capsys)
