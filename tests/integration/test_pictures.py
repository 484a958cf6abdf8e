"""The pictures' scripts draw this tree, and count it."""

from docs.pictures import counts, imports
from train.errors import ROOT


def test_import_graph_is_drawn_from_this_tree(tmp_path):
    said = imports.draw(ROOT, tmp_path / "imports.png")
    assert (tmp_path / "imports.png").read_bytes().startswith(b"\x89PNG")
    assert "1 circles between boxes" in said, "ARCHITECTURE.md names one: model/linear, kernels"


def test_floors_lie_above_what_they_import(tmp_path):
    files = {"a/x.py": "import b.y\n", "b/y.py": "", "b/z.py": "from b import y\n"}
    for name, text in files.items():
        path = tmp_path / name.replace("a/", "train/").replace("b/", "data/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("b", "data"))
    found = imports.files_of(tmp_path)
    arrows = imports.imports(found)
    assert arrows == {("train.x", "data.y"), ("data.z", "data.y")}
    _, floor = imports.boxes(list(found), arrows)
    assert floor == {"data": 0, "train": 1}


def test_counts_are_of_both_trees(tmp_path):
    for tree, text in (
        ("old", "def f():\n    pass\n"),
        ("new", "class A:\n    pass\n\n\n_x = 1\n"),
    ):
        (tmp_path / tree / "data").mkdir(parents=True)
        (tmp_path / tree / "data" / "x.py").write_text(text)
    lines = counts.table(tmp_path / "old", tmp_path / "new").splitlines()
    assert "| data | 1 | 1 | 2 | 5 | 1 | 1 |" in lines
    assert lines[-1] == "| all | 1 | 1 | 2 | 5 | 1 | 1 |"
