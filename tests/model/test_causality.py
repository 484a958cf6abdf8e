"""Causality: changing token t changes no output before t, bit for bit in reference mode.

In fast mode experts run as a grouped matmul, where a row's bits depend on how many rows its expert
got; later tokens change that, so there the bound is 1e-6. Gradients from earlier outputs to later
embeddings are exactly 0 in both.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import Kernels, LayerKind, Residual
from tests.parity.configs import tiny_config
from tests.parity.properties import check_causality

# around the ends of blocks of 4 and 8, of the window, of the row
PLACES = (3, 4, 8, 20, 31, 32, 39, 44)
ALL_KINDS = tiny_config(
    num_hidden_layers=6,
    layer_kinds=[LayerKind(k) for k in ("swa", "hca", "csa", "dense", "hca", "csa")],
    compress_ratios=[0, 8, 4, 0, 5, 3],
    num_nextn_predict_layers=2,
)


@pytest.mark.core
@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.fast])
def test_no_output_depends_on_later_tokens(kernels: Kernels) -> None:
    config = replace(ALL_KINDS, kernels=kernels)
    check_causality(config, kernels is Kernels.reference, PLACES)


@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.fast])
@pytest.mark.parametrize(
    ("kind", "ratio"), [("swa", 0), ("csa", 4), ("hca", 8), ("dense", 0), ("mha", 0)]
)
def test_each_kind_alone_is_causal(kind: str, ratio: int, kernels: Kernels) -> None:
    config = tiny_config(
        num_hidden_layers=2,
        layer_kinds=[LayerKind(kind)] * 2,
        compress_ratios=[ratio] * 2,
        num_nextn_predict_layers=1,
        kernels=kernels,
    )
    check_causality(config, kernels is Kernels.reference, (3, 8, 31, 39))


@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.fast])
def test_packed_and_plain_residual_are_causal(kernels: Kernels) -> None:
    config = replace(ALL_KINDS, kernels=kernels, residual=Residual.plain)
    check_causality(config, kernels is Kernels.reference, (8, 16, 17, 30), (17, 28))
