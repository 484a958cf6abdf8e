"""Reads the model of a run folder, or of one checkpoint: as the run's last step used it.

Where its stage attended to all entries, or did not use YaRN yet, the config says so, and
quantisation is switched on where it was (``recipe``).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.prepare import build_tokenizer
from data.tokenizer import Tokenizer, folder_tokenizer
from model.config import IndexerPhase, ModelConfig
from model.state_dict import official_items
from quant.config import QuantConfig
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.average import require, saved_name
from train.checkpoint.files import MANIFEST, open_manifest, sha256_of
from train.checkpoint.hold import Hold
from train.checkpoint.manager import Checkpoints
from train.config.flat import flat_config
from train.config.model_json import CONFIG_JSON, read_config_json
from train.config.schema import RunConfig, Weights
from train.errors import UserError
from train.exchange.model_card import Provenance
from train.exchange.model_source import check_values, meta_model
from train.record.receipt import read_receipt
from train.run_folder.folder import CHECKPOINTS, CONFIG, TOKENIZER, read_run
from train.run_folder.origin import check_export
from train.stages import resolve

log = logging.getLogger(__name__)

_TOLD = (
    "optim.name", "optim.lr", "train.seq_len", "train.global_batch_tokens", "train.precision",
    "quant.recipe", "seed",
)  # fmt: skip


class RunSource:
    """A run folder (its newest good checkpoint), one checkpoint of it, or an imported model.

    Args:
        path: the run folder or the checkpoint.
        weights: which of them.

    Raises:
        UserError: no complete checkpoint, no config beside it, or not with such weights.
    """

    def __init__(self, path: Path, weights: Weights = Weights.model) -> None:
        self._hold, self._state = _held(path)  # for as long as this is there
        self.path = self._hold.folder
        self._root = self.path.absolute().parents[1]
        self._run: RunConfig | None = None
        self.origin = f"sha256 {sha256_of(self.path / MANIFEST)}, {weights.value} weights"
        self.config, self.quant = self._read_config(self._state)
        self.provenance = self._provenance(weights)
        model = meta_model(self.config)
        self._meta = model.state_dict()
        parameters = {name for name, _ in model.named_parameters()}
        self._name = {name: saved_name(name, weights, parameters) for name in self._meta}
        self._saved = checkpoint_reader.SavedTensors(self.path)
        require(weights, self.path, self._saved.shapes, "--weights")
        self._check_tensors()
        self.shapes: dict[str, torch.Size] = {}
        self._place: dict[str, tuple[str, int]] = {}
        for name, tensor in self._meta.items():
            for part, (official, value) in enumerate(official_items({name: tensor})):
                self.shapes[official] = value.shape
                self._place[official] = (name, part)
        self._held: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """See :class:`ModelSource`; a stack of experts is held until another is asked for."""
        ours, part = self._place[name]
        if self._held is None or self._held[0] != ours:
            self._held = None  # first, so that two stacks never lie in memory
            self._held = (ours, self._load(ours))
        value = self._held[1]
        return value[part] if value.dim() == 3 else dict(official_items(self._folded(ours)))[name]

    def tokenizer(self) -> Tokenizer | None:
        """See :class:`ModelSource`: the folder's; an older run's as its data section builds it."""
        stored = folder_tokenizer(self._root)
        if self._run is None:
            return stored
        tokenizer = build_tokenizer(self._run.data) if stored is None else stored
        try:
            check_export(self.path, self._state, self._run, tokenizer)
        except UserError as error:
            where = "" if stored is None else f"{self._root / TOKENIZER}: "
            raise UserError(f"{where}{error}") from error
        return tokenizer

    def _provenance(self, weights: Weights) -> Provenance:
        if self._run is None:  # an imported model
            return Provenance()
        progress, values = self._state.get("progress", {}), flat_config(self._run)
        return Provenance(
            run=self._root.name,
            step=progress.get("step", 0),
            tokens=progress.get("tokens", 0),
            val_loss=self._state.get("val_loss"),
            weights=weights.value,
            settings={key: values[key] for key in _TOLD},
            receipt=read_receipt(self._root),
        )

    def _folded(self, name: str) -> dict[str, Tensor]:
        assert self._held is not None
        gamma = name.removesuffix(".fn") + ".gamma"
        state = {name: self._held[1]}
        return state | ({gamma: self._load(gamma)} if gamma in self._meta else {})

    def _load(self, name: str) -> Tensor:
        tensor = torch.empty_like(self._meta[name], device="cpu")
        self._saved.load({self._name[name]: tensor})
        check_values(self.path, name, tensor, self.config)
        return tensor

    def _check_tensors(self) -> None:
        for name, tensor in self._meta.items():
            saved, wanted = self._name[name], list(tensor.shape)
            found = self._saved.shapes.get(saved)
            if found != tensor.shape:
                has = "is missing" if found is None else f"has shape {list(found)}"
                raise UserError(f"checkpoint {self.path}: {saved} {has}, its config wants {wanted}")

    def _read_config(self, state: dict[str, Any]) -> tuple[ModelConfig, QuantConfig | None]:
        if not (self._root / CONFIG).is_file():
            if not (self._root / CONFIG_JSON).is_file():
                raise UserError(
                    f"checkpoint {self.path}: neither {CONFIG} nor {CONFIG_JSON} in {self._root}"
                )
            return read_config_json(self._root / CONFIG_JSON)
        self._run = run = read_run(self._root)
        check_export(self.path, state, run)
        # The stage of the last step, which began before the position that was reached.
        tokens = state.get("progress", {}).get("tokens", 0)
        stage = resolve(run).stage(max(tokens - 1, 0))
        config = run.model
        if stage.seq_len < config.yarn_from_seq_len:
            config = replace(config, rope_scaling=replace(config.rope_scaling, factor=1.0))
        config = replace(config, yarn_from_seq_len=0)
        if stage.indexer_phase != IndexerPhase.sparse:
            log.warning(
                "%s ended in indexer phase %s: all visible entries are attended to",
                self._root, stage.indexer_phase.value,
            )  # fmt: skip
            config = replace(config, index_topk=config.max_position_embeddings)
        return config, run.quant if stage.quantised and run.quant.active else None


def _held(path: Path) -> tuple[Hold, dict[str, Any]]:
    """The checkpoint that a path means, and its state; every byte of it is compared once."""
    if (path / MANIFEST).is_file():
        return Hold(path), checkpoint_reader.verify(path)
    good = Checkpoints(path / CHECKPOINTS).hold_newest()
    if good is None:
        raise UserError(f"{path} holds no complete checkpoint in {CHECKPOINTS}/")
    return good, checkpoint_reader.read_state(good.folder, open_manifest(good.folder))
