"""The record of a checkpoint that weights are taken from, compared with what they are taken for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from data.content import tokenizer_content
from data.tokenizer import Tokenizer, folder_tokenizer
from model.config import ModelConfig
from model.config_json import official_config
from parallel.collectives import gathered
from train.checkpoint.files import open_manifest
from train.checkpoint.reader import read_state, together
from train.config.flat import flat_config, flatten
from train.config.model_json import CONFIG_JSON, read_config_json
from train.config.schema import RunConfig
from train.errors import UserError
from train.run_folder.folder import CONFIG, read_flat_config
from train.run_folder.identity import RunIdentity, Use, check, check_ranks, recorded_in

IMPORTED = "imported_from"  # of the state of a checkpoint that no run of ours wrote


def check_origin(
    use: Use, folder: Path, now: RunIdentity, where: str, run: RunConfig, tokenizer: Tokenizer
) -> RunIdentity:
    """Refuse a checkpoint that the table of identity.py refuses for a use. Collective.

    Args:
        use: resume, init_from or evaluate.
        folder: a checkpoint whose files verify.
        now: what it is wanted for.
        where: how the user named it, for messages.
        run: whose record ``now`` is.
        tokenizer: of that run.

    Returns:
        The checkpoint's record.

    Raises:
        DamagedCheckpointError: its state cannot be read.
        UserError: names the key and both values.
    """
    state = together(lambda: read_state(folder, open_manifest(folder)))
    if IMPORTED in state:
        recorded, now = _imported(folder.absolute().parents[1], run.model, tokenizer)
    else:
        recorded = recorded_by(folder, state, now)
    check(use, recorded, now, where, state.get("progress", {}).get("tokens", 0))
    return recorded


def check_export(
    folder: Path, state: Mapping[str, Any], run: RunConfig, tokenizer: Tokenizer | None = None
) -> None:
    """Refuse to read a run's weights with another model or tokenizer than its checkpoint's.

    Args:
        folder: the checkpoint.
        state: of it.
        run: config of the run folder around it.
        tokenizer: that this config leads to now; None: not built.

    Raises:
        UserError: names the key and both values.
    """
    content = None if tokenizer is None else tokenizer_content(tokenizer)
    now = RunIdentity(config=flat_config(run), tokenizer=content)
    check(Use.export, recorded_by(folder, state, now), now, f"checkpoint {folder}")


def recorded_by(folder: Path, state: Mapping[str, Any], now: RunIdentity) -> RunIdentity:
    """The record in a checkpoint's state; of an older one what its run folder tells besides."""
    config = folder.absolute().parents[1] / CONFIG
    around = read_flat_config(config) if "identity" not in state and config.is_file() else None
    return recorded_in(state, around, now, f"checkpoint {folder}")


def agree_on_ranks(record: RunIdentity) -> None:
    """Refuse ranks that differ. Collective.

    Raises:
        UserError: the same on every rank; names those that differ, the key and both values.
    """
    if len(set(gathered(record.digest()))) > 1:
        check_ranks(gathered(record))


def check_steps(asked: int, done: int, run_dir: str) -> None:
    """Refuse a run that is to end before the step that it has reached.

    Raises:
        UserError: names both.
    """
    if asked < done:
        raise UserError(
            f"train.steps={asked} ends the run before step {done}, which run_dir={run_dir} has"
            " done: give more steps, or another run_dir"
        )


# ---- models that no run of ours wrote ------------------------------------------------------------
def _imported(
    root: Path, model: ModelConfig, tokenizer: Tokenizer
) -> tuple[RunIdentity, RunIdentity]:
    """What an imported model is, and what is asked for, in the keys of a ``config.json``."""
    ours, known = tokenizer_content(tokenizer), folder_tokenizer(root)
    if known is None:
        theirs = None
    else:  # it is stored in another form than ours
        theirs = ours if same_ids(known, tokenizer) else tokenizer_content(known)
    path = root / CONFIG_JSON
    config = _official(read_config_json(path)[0]) if path.is_file() else None
    return RunIdentity(config, theirs), RunIdentity(_official(model), ours)


def _official(model: ModelConfig) -> dict[str, Any]:
    """What released configs say of a model, kinds and routers of all layers spelled out."""
    names = {f.name for f in fields(ModelConfig)}
    values = {key: value for key, value in official_config(model).items() if key in names}
    values["rope_scaling"].pop("type")
    return flatten({"model": values})


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers agree in their sizes and on some text: that of this file."""
    text = Path(__file__).read_text(encoding="utf-8") + "\u00e9\u4e2d\U0001f600\t\r\n  "
    sizes = ((t.vocab_size, t.eos_id) for t in (one, other))
    return len(set(sizes)) == 1 and one.encode(text) == other.encode(text)
