"""Runs under ``engine=deepspeed``: audited, killed and resumed bitwise, handed to other engines.

One spawn of two ranks for all of them, since DeepSpeed takes seconds to import. The loss of the
first step after a change of engine is held to 1e-5, as for a change of layout.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from optim.muon import direction_, update_scale
from optim.newton_schulz import newton_schulz
from parallel import zero_optimizer
from parallel.config import EngineConfig, EngineName, OffloadTo
from quant.config import QuantConfig, Recipe
from tests.helpers import run_distributed
from tests.integration.small_run import (
    Killed,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.audit.faults import AuditError
from train.build import build
from train.checkpoint.own_folder import OWN
from train.errors import ExitCode

TORCH = EngineConfig()
ZERO_2 = EngineConfig(EngineName.deepspeed, 2, OffloadTo.cpu)
ZERO_3 = EngineConfig(EngineName.deepspeed, 3)


def on_rank(rank, world, folder, corpus):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}

    def run(name, engine, **train):
        plain = small_run(
            folder / name, corpus, steps=3, **{"checkpoint_every": 1, "keep_checkpoints": 2} | train
        )
        return replace(plain, engine=engine)

    killed_run_continues_bitwise(run, rank)
    run_goes_from_engine_to_engine(run)
    planted_updates_are_named(run)


def fit_until(run, step):
    """A run that dies behind this step, before its checkpoint."""
    trainer = build(run)
    write = trainer.recorder.write

    def then_die(done, *args):
        write(done, *args)
        if done.number == step:
            raise Killed

    setattr(trainer.recorder, "write", then_die)  # noqa: B010  of another signature
    with pytest.raises(Killed):
        trainer.fit()


def killed_run_continues_bitwise(run, rank):
    """Quantised, so that the audit holds what was cast; DeepSpeed's own folder is written too."""
    engine = replace(ZERO_3, own_checkpoints=True)
    straight, killed = (
        replace(run(name, engine), quant=QuantConfig(recipe=Recipe.fp4_qat))
        for name in ("straight", "killed")
    )
    code, trainer = fit(straight)
    assert code == ExitCode.finished
    assert trainer.audit.result()["steps"] == [1, 2, 3]
    fit_until(killed, 2)
    assert fit(killed)[0] == ExitCode.finished
    assert differing(final_tensors(killed), final_tensors(straight)) == []
    assert metrics_of(killed) == metrics_of(straight)
    saved = final_tensors(straight)  # collective
    if rank == 0:
        own_folder_holds_the_weights(Path(straight.run_dir), saved)


def own_folder_holds_the_weights(folder, saved):
    """Of the steps of ours, and no others; read by DeepSpeed's own tool."""
    from deepspeed.utils.zero_to_fp32 import (  # noqa: PLC0415  an extra
        get_fp32_state_dict_from_zero_checkpoint,
    )

    ours = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    theirs = sorted(path.name for path in (folder / OWN).glob("step_*"))
    assert ours == ["step_00000002", "step_00000003"]
    assert theirs[-len(ours) :] == ours
    assert len(theirs) <= len(ours) + 1  # one that went after it was written
    weights = get_fp32_state_dict_from_zero_checkpoint(str(folder / OWN))
    assert weights is not None
    for name, tensor in weights.items():
        assert torch.equal(tensor, saved[name].float()), name


def run_goes_from_engine_to_engine(run):
    """torch, ZeRO 2 and torch, a step each: as if torch had run all the time."""
    straight = run("torch", TORCH)
    assert fit(straight)[0] == ExitCode.finished
    for engine, dies in ((TORCH, 2), (ZERO_2, 3), (TORCH, None)):
        moved = run("moved", engine)
        if dies:
            fit_until(moved, dies)
        else:
            assert fit(moved)[0] == ExitCode.finished
    expected, found = metrics_of(straight), metrics_of(moved)
    assert [r["step"] for r in found] == [1, 2, 3]
    for step in (1, 2, 3):  # the first of an engine, each
        bound = 1e-5 if step < 3 else 1e-3  # after a free step: Newton-Schulz amplifies
        assert found[step - 1]["loss"] == pytest.approx(expected[step - 1]["loss"], rel=bound)


def flat_shards(trainer):
    """Each row by itself is a vector of norm 1."""
    muon = trainer.engine._muon
    step_round = muon._step_round

    def flat_round(now, momentum, lr):
        shards = replace(now, rows=1, cols=now.rows * now.cols)
        step_round(shards, momentum.view(len(momentum), 1, -1), lr)

    muon._step_round = flat_round
    return {}


LATE = "layers.0.attn.wq_a.weight"
LERP, NONE, FIVE, SCALE = (4, 128), (256, 16), (16, 16), (4, 32)  # shapes; few matrices have each


def releases_own(trainer):
    """One fault for each shape, since an error tells 20 lines.

    Momentum by lerp; no Newton-Schulz, as before the pinned release at stage 0 and under
    ``zero.Init``; five steps of one triple; ``sqrt(max(1, rows / columns))`` whatever
    ``optim.muon.rms`` says; and a master set after DeepSpeed's step.
    """
    from deepspeed.runtime.zero.muon.original_muon import (  # noqa: PLC0415  an extra
        zeropower_via_newtonschulz5,
    )

    def direction(grad, momentum, mu, nesterov, out):
        if grad.shape != LERP:
            return direction_(grad, momentum, mu, nesterov, out)
        momentum.lerp_(grad, 1 - mu)
        return out.copy_(torch.lerp(grad, momentum, mu))

    def orthogonalise(matrices, *args):
        if matrices.shape[1:] == FIVE:
            with torch.compiler.set_stance("force_eager"):
                return zeropower_via_newtonschulz5(matrices, steps=5).float()
        return matrices if matrices.shape[1:] == NONE else newton_schulz(matrices, *args)

    def scale(rows, cols, config):
        own = max(1.0, rows / cols) ** 0.5
        return own if (rows, cols) == SCALE else update_scale(rows, cols, config)

    parts, step = trainer.engine.partitions, trainer.engine._zero_engine.step
    set_master, kept = parts.set_master, {}

    def set_or_keep(name, value):
        kept[name] = value
        if name != LATE:
            set_master(name, value)

    def then_set():
        step()
        set_master(LATE, kept[LATE])

    parts.set_master, trainer.engine._zero_engine.step = set_or_keep, then_set
    return {"direction_": direction, "newton_schulz": orthogonalise, "update_scale": scale}


def planted_updates_are_named(run):
    """What flat shards, a master that comes late, and the release's own Muon would do."""

    def audited(name, plant):
        """What the audit says of the first step."""
        asked = run(name, EngineConfig(EngineName.deepspeed, 1), eval_every=0)
        asked.optim.muon.rms = 0.45  # else the release's scale is ours, for matrices as small
        trainer = build(asked)
        of_shape = {(now.rows, now.cols): now.records for now in trainer.engine._muon._rounds}
        with patch.dict(vars(zero_optimizer), plant(trainer)):
            with pytest.raises(AuditError) as caught:
                trainer.fit()
        return str(caught.value), of_shape

    told, _ = audited("flat", flat_shards)
    assert re.search(r"algorithm: .*: muon was asked for, but", told)
    told, of_shape = audited("own", releases_own)
    assert f"owner: {LATE} received a gradient but did not move" in told
    for shape, line in (
        (LERP, r"momentum: {}: the first step leaves 0\.05 times its clipped gradient"),
        (NONE, r"algorithm: {}: muon was asked for, but [01][.\d]* of the update's energy"),
        (FIVE, r"algorithm: {}: the update's largest singular value is 1\.[01]\d*, but"),
        (SCALE, r"algorithm: {}: muon was asked for, but 0\.\d+ of the update's energy"),
    ):
        names = "|".join(re.escape(record.name) for record in of_shape[shape])
        assert re.search(line.format(f"({names})"), told), (line, told)


def test_runs_under_deepspeed(tmp_path):
    run_distributed(on_rank, 2, tmp_path, write_corpus(tmp_path))
