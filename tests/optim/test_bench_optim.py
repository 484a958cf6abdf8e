"""The benchmark compares like with like: the peer gets the same matrices and does the same work."""

import json

import pytest
import torch

from optim.build import build_optimizer
from optim.config import MatmulDtype, NewtonSchulzIterations, OptimConfig
from scripts.benchmarks.optim import (
    LR,
    build_peer,
    main,
    model_shapes,
    random_parameters,
)
from tests.helpers import relative, small_config


def test_peer_takes_the_same_first_step():
    # torch.optim.Muon averages where ours sums, which differs by a factor before the step that
    # Newton-Schulz removes; it has one triple of coefficients and a root mean square of 0.2.
    config = OptimConfig()
    config.muon.dtype = MatmulDtype.bf16
    config.muon.rms = 0.2
    config.muon.newton_schulz = [NewtonSchulzIterations(5, 3.4445, -4.7750, 2.0315)]
    model = small_config()
    parameters = random_parameters(model_shapes(model), torch.device("cpu"))
    ours = build_optimizer(parameters.items(), config, split_counts={"o_groups": model.o_groups})
    muon, adamw = build_peer(ours.table, parameters, config)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    ours.step(LR)
    muon.step()
    adamw.step()
    matrices = iter(muon.param_groups[0]["params"])
    for record in ours.table:
        start, end = before[record.name], parameters[record.name].detach()
        shape = (record.num_matrices, -1, record.shape[-1])
        if not record.num_matrices:
            continue
        for old, new in zip(start.view(shape), end.view(shape), strict=True):
            theirs = next(matrices).detach()
            assert theirs.shape == new.shape
            # bf16: the order of rounding differs.
            assert relative(new - old, theirs - old) < 0.1, record.name
    assert next(matrices, None) is None
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert len(rest) == sum(not r.num_matrices for r in ours.table)


def test_report_is_written(tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--model", "v4_tiny", "--repeats", "1", "--warmup", "0", "--json", str(path)]
    main(arguments)
    report = json.loads(path.read_text())
    assert report["ratio"] == pytest.approx(report["peer_seconds"] / report["ours_seconds"])
    assert report["floor_seconds"] * report["matmul_flops_per_second"] == pytest.approx(
        report["flops"]
    )
    assert "ratio" in capsys.readouterr().out
