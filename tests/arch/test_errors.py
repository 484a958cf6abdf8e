"""An exception's class says whose fault it is: a plain ``ValueError`` is ours, not the user's.

The list names every place that may raise one: a call that our own code gets wrong.
"""

import ast
from pathlib import Path

import pytest

from train.errors import ROOT, USER_ERRORS

PACKAGES = ("model", "optim", "parallel", "quant", "data", "train", "conf", "scripts")
MISUSE = {
    "data/global_batch.py": "rows that a batch does not have",
    "data/loader.py": "a batch without rows or tokens",
    "model/activation_memory.py": "a mode that no config has",
    "model/flops.py": "a phase that no config has",
    "model/parameter_counts.py": "a parameter without a kind",
    "model/init.py": "a parameter without a line in the table",
    "model/kernels/mhc_fast.py": "dtypes that the model never has",
    "model/kernels/triton/fake_quant.py": "shapes and dtypes that blocks cannot have",
    "model/kernels/select.py": "an op that is not in the table",
    "model/precision.py": "a parameter without a line in the table",
    "optim/build.py": "a phase whose parameters take no gradient",
    "optim/groups.py": "a parameter without an owner",
    "optim/newton_schulz.py": "not a batch of matrices",
    "quant/apply.py": "a name of the table that is another kind of module",
    "quant/export.py": "a tensor without a line in the table",
    "quant/formats.py": "shapes and dtypes that blocks cannot have",
    "quant/indexer.py": "a Hadamard matrix that does not exist",
    "quant/linear.py": "a weight that is not the master",
    "scripts/benchmarks/peer.py": "a model that has no twin there",
    "scripts/layout_trials/exchanges.py": "an exchange without a rule",
    "scripts/layout_trials/step_parts.py": "a trace that it did not write",
    "scripts/studies/law.py": "a law through fewer points than a study may ask for",
}


def raised_names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call | ast.Name):
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(getattr(called, "id", ""))
    return found


@pytest.mark.core
def test_plain_value_errors_are_raised_only_where_our_own_code_is_wrong():
    plain = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "ValueError" in raised_names(path)
    }
    assert plain == set(MISUSE)


@pytest.mark.core
def test_users_errors_are_one_class_a_package():
    owners = {error.__module__ for error in USER_ERRORS}
    assert owners == {f"{p}.errors" for p in PACKAGES if p not in ("scripts", "conf")}
    assert ValueError not in USER_ERRORS
