"""Floats are added to indexed places in one file, which knows the op that keeps an order.

``index_add_`` and ``scatter_add_`` on CUDA, and ``index_put_`` with ``accumulate`` on a CPU, add in
whatever order threads come: equal runs would differ in their last bits.
"""

import ast

import pytest

from train.errors import ROOT

PACKAGES = ("model", "optim", "parallel", "quant", "train")
ADDS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce",
        "scatter_reduce_", "index_put", "index_put_", "index_reduce_", "put_", "histc"}  # fmt: skip
MAY = {
    ("model/kernels/gather.py", "index_add_"): "the one place",
    ("model/kernels/gather.py", "index_put_"): "the one place",
    ("model/kernels/cross_entropy.py", "scatter_add_"): "one place a row, so nothing meets",
    ("model/kernels/gather.py", "scatter_add_"): "integers",
}


def unordered_sums(source: str) -> list[str]:
    """Names of calls that add to indexed places; bincount only with weights."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        named = {keyword.arg for keyword in node.keywords}
        # positional arguments of torch.bincount: input, weights, minlength
        weighted = name == "bincount" and (len(node.args) > 1 or "weights" in named)
        if name in ADDS or weighted:
            found.append(name)
    return found


@pytest.mark.core
def test_floats_meet_in_one_place():
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in unordered_sums(path.read_text())
    }
    assert found == set(MAY)


def test_the_search_finds_what_it_should():
    source = "x.index_add_(0, i, r); torch.bincount(i, w, minlength=3); torch.bincount(i)"
    assert unordered_sums(source) == ["index_add_", "bincount"]
