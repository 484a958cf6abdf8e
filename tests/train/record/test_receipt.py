"""The hash of the sources: whatever can change a run's numbers changes it, nothing else does."""

import pytest

from train.record.receipt import source_hash

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", ["model/moe/gate.py", "model/kernels/cpu/mhc.cpp", "model/keys.h"])
def test_every_source_counts(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("int a;")
    before = source_hash(tmp_path)
    path.write_text("int b;")
    after = source_hash(tmp_path)
    path.rename(path.with_stem("other"))
    assert len({before, after, source_hash(tmp_path)}) == 3


def test_what_is_built_or_written_beside_the_sources_does_not(tmp_path):
    (tmp_path / "model" / "__pycache__").mkdir(parents=True)
    before = source_hash(tmp_path)
    (tmp_path / "model" / "__pycache__" / "gate.pyc").write_bytes(b"1")
    (tmp_path / "README.md").write_text("x")
    assert source_hash(tmp_path) == before
