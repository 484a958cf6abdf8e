"""Reads models: our run folders and checkpoints, ``transformers`` folders, official folders.

:func:`open_source` finds out what a path holds and gives its tensors under official names, one at a
time, so that whoever copies them never holds more than one (of a run: one stack of experts).
:func:`load_model` fills a model from it. Writing is in ``train/export.py``.

A run's checkpoint is read as its last step used it: where its stage attended to all entries, or did
not use YaRN yet, the config says so, and quantisation is switched on where it was (``recipe``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.prepare import build_tokenizer
from data.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.state_dict import official_items, transformers_name
from model.transformer import DeepSeekV4
from quant.apply import apply_quant
from quant.config import QuantConfig, Recipe
from quant.export import scale_name
from quant.importing import dequantise_official
from quant.probe import QuantProbe
from train import checkpoint_reader
from train.checkpoint import Checkpoints
from train.checkpoint_files import MANIFEST, sha256_of
from train.config import IndexerPhase, RunConfig
from train.errors import UserError, one_line
from train.run_folder import CHECKPOINTS, CONFIG, read_run
from train.stages import resolve
from train.transformers_config import from_transformers_config, is_transformers_config

log = logging.getLogger(__name__)

CONFIG_JSON = "config.json"
QUANT_KEY = "quant"  # of config.json: the casts with which the weights were trained
_QUANTISED = (torch.int8, torch.float8_e4m3fn)
_OPEN_SHARDS = 2  # a weight's scale, or the next tensor, may lie in the next shard


class Source(Protocol):
    """A model that lies somewhere, under official names.

    Attributes:
        config: sizes, as of the last step.
        quant: how the model was quantised while it trained; None: not at all, or not known.
        origin: changes when the content does.
        shapes: of every official tensor.
    """

    config: ModelConfig
    quant: QuantConfig | None
    origin: str
    shapes: dict[str, torch.Size]

    def read(self, name: str) -> Tensor:
        """Value of an official tensor, on the CPU; quantised ones are decoded to fp32."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if there is one.

        Raises:
            ValueError: there is one, and it cannot be read.
        """
        ...


def open_source(path: Path) -> Source:
    """Whatever model ``path`` holds.

    Raises:
        UserError: nothing that is known, or it is damaged or incomplete.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / MANIFEST).is_file() or (path / CHECKPOINTS).is_dir():
        return RunSource(path)
    if (path / CONFIG_JSON).is_file() and any(path.glob("*.safetensors")):
        return FolderSource(path)
    raise UserError(
        f"{path} holds no model: neither a run ({CHECKPOINTS}/), nor a checkpoint"
        f" ({MANIFEST}), nor {CONFIG_JSON} with .safetensors files"
    )


def load_model(
    path: Path, device: torch.device | str = "cpu", recipe: Recipe | None = None
) -> tuple[DeepSeekV4, Tokenizer | None]:
    """A model and its tokenizer from any known folder.

    Args:
        path: run folder, checkpoint, ``transformers`` folder or official folder.
        device: where the model goes.
        recipe: casts of the forward pass; None: those that it was trained with, as far as known.

    Returns:
        The model with fp32 parameters, in fp32 compute, no gradients; the tokenizer or None.

    Raises:
        ValueError: it cannot be read.
    """
    source = open_source(path)
    model = DeepSeekV4(source.config)
    for name, tensor in model.state_dict().items():
        fill_parameter(tensor, name, source)
    model.requires_grad_(False)
    quant = source.quant if recipe is None else QuantConfig(recipe=recipe)
    if quant is not None and quant.active:
        apply_quant(model, quant, QuantProbe(), keep_weights=True)
    return model.to(device), source.tokenizer()


@torch.no_grad()
def fill_parameter(target: Tensor, name: str, source: Source) -> None:
    """Copy one of our parameters, or buffers, from a source; a gamma becomes 1 (it is folded)."""
    if name.endswith(".gamma"):
        target.fill_(1.0)
        return
    official = [n for n, _ in official_items({name: target})]
    if target.dim() == 3:
        for expert, part in enumerate(official):
            target[expert].copy_(source.read(part))
    else:
        target.copy_(source.read(official[0]))


def meta_state(config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters and buffers without memory."""
    with torch.device("meta"):
        return DeepSeekV4(config).state_dict()


# ---- our runs ------------------------------------------------------------------------------------
class RunSource:
    """A run folder (its newest good checkpoint), one checkpoint of it, or an imported model.

    Args:
        path: the run folder or the checkpoint.

    Raises:
        UserError: no complete checkpoint, or no config beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = _newest(path)
        self._root = self.path.absolute().parents[1]
        self._run: RunConfig | None = None
        state = checkpoint_reader.verify(self.path)
        self.origin = f"sha256 {sha256_of(self.path / MANIFEST)}"
        self.config, self.quant = self._read_config(state)
        self._meta = meta_state(self.config)
        self._check_tensors()
        self.shapes: dict[str, torch.Size] = {}
        self._place: dict[str, tuple[str, int]] = {}
        for name, tensor in self._meta.items():
            for part, (official, value) in enumerate(official_items({name: tensor})):
                self.shapes[official] = value.shape
                self._place[official] = (name, part)
        self._held: tuple[str, Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """See :class:`Source`; a stack of experts is held until another is asked for."""
        ours, part = self._place[name]
        if self._held is None or self._held[0] != ours:
            self._held = None  # first, so that two stacks never lie in memory
            self._held = (ours, self._load(ours))
        value = self._held[1]
        return value[part] if value.dim() == 3 else dict(official_items(self._folded(ours)))[name]

    def tokenizer(self) -> Tokenizer | None:
        """See :class:`Source`: as the run's data section builds it, or the imported one."""
        if self._run is None:
            return _folder_tokenizer(self._root)
        return build_tokenizer(self._run.data)

    def _folded(self, name: str) -> dict[str, Tensor]:
        assert self._held is not None
        gamma = name.removesuffix(".fn") + ".gamma"
        state = {name: self._held[1]}
        return state | ({gamma: self._load(gamma)} if gamma in self._meta else {})

    def _load(self, name: str) -> Tensor:
        tensor = torch.empty_like(self._meta[name], device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled, unavailable or uninit"
            )
            reader = dcp.FileSystemReader(self.path)
            dcp.load({f"model.{name}": tensor}, storage_reader=reader, no_dist=True)
        return tensor

    def _check_tensors(self) -> None:
        saved = checkpoint_reader.saved_tensors(self.path)
        for name, tensor in self._meta.items():
            found = saved.get(f"model.{name}")
            if found != tensor.shape:
                has = "is missing" if found is None else f"has shape {list(found)}"
                raise UserError(
                    f"checkpoint {self.path}: {name} {has}, its config wants {list(tensor.shape)}"
                )

    def _read_config(self, state: dict[str, Any]) -> tuple[ModelConfig, QuantConfig | None]:
        if not (self._root / CONFIG).is_file():
            if not (self._root / CONFIG_JSON).is_file():
                raise UserError(
                    f"checkpoint {self.path}: neither {CONFIG} nor {CONFIG_JSON} in {self._root}"
                )
            return _read_config_json(self._root / CONFIG_JSON)
        self._run = run = read_run(self._root)
        # The stage of the last step, which began before the position that was reached.
        stage = resolve(run).stage(max(state["progress"]["tokens"] - 1, 0))
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


def _newest(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    good = Checkpoints(path / CHECKPOINTS).newest_good()
    if good is None:
        raise UserError(f"{path} holds no complete checkpoint in {CHECKPOINTS}/")
    return good


# ---- folders of safetensors ----------------------------------------------------------------------
@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies, and what its file's header says of it."""

    shard: Path
    dtype: str
    shape: list[int]


class FolderSource:
    """``config.json`` and safetensors: official names, plain or quantised, or transformers' own.

    ``transformers`` writes a third kind of names with ``save_pretrained``; it is read too.

    Args:
        folder: of the files.

    Raises:
        UserError: a tensor is missing, not known, or of another shape; a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._stored = self._find_tensors()
        self.config, self.quant = _read_config_json(folder / CONFIG_JSON)
        depths = self.config.num_nextn_predict_layers
        if depths and not any(name.startswith("mtp.") for name in self._stored):
            log.warning("%s holds no MTP block: the model is read without", folder)
            ratios = self.config.compress_ratios[: self.config.num_hidden_layers]
            self.config = replace(
                self.config, num_nextn_predict_layers=0, compress_ratios=list(ratios)
            )
        self.shapes = {n: t.shape for n, t in official_items(meta_state(self.config))}
        self._where = {name: self._resolve(name) for name in self.shapes}
        self._refuse_unknown()
        self._check_shapes()
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in _shards(folder)]
        self.origin = f"sha256 {hashlib.sha256(json.dumps(stats).encode()).hexdigest()}"

    def read(self, name: str) -> Tensor:
        """See :class:`Source`."""
        stored, part = self._where[name]
        if part is not None:
            return self._file(stored).get_slice(stored)[part].squeeze(0)
        tensor = self._file(stored).get_tensor(stored)
        if tensor.dtype not in _QUANTISED:
            return tensor
        scale = scale_name(stored)
        pair = [(stored, tensor), (scale, self._file(scale).get_tensor(scale))]
        return dict(dequantise_official(pair))[stored]

    def tokenizer(self) -> Tokenizer | None:
        """See :class:`Source`."""
        return _folder_tokenizer(self.folder)

    def _find_tensors(self) -> dict[str, _Tensor]:
        found: dict[str, _Tensor] = {}
        for shard in _shards(self.folder):
            try:
                with safe_open(shard, framework="pt") as file:
                    for name in file.keys():
                        view = file.get_slice(name)
                        found[name] = _Tensor(shard, view.get_dtype(), list(view.get_shape()))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{shard} cannot be read: {one_line(error)}") from error
        return found

    def _file(self, stored: str) -> Any:
        """The file of a tensor. Few stay open: each is mapped as a whole, as memory of its own."""
        shard = self._stored[stored].shard
        if shard not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard]

    def _resolve(self, name: str) -> tuple[str, tuple[slice, ...] | None]:
        """The stored tensor that holds an official one, and the part of it where it is stacked."""
        for stored in _spellings(name):
            if stored in self._stored:
                return stored, None
        head, _, tail = name.partition(".ffn.experts.")
        if tail and not name.startswith("mtp."):
            expert, matrix, _ = tail.split(".")
            leaf = "down_proj" if matrix == "w2" else "gate_up_proj"
            stored, width = f"model.{head}.mlp.experts.{leaf}", self.shapes[name][0]
            if stored in self._stored:
                begin = width if matrix == "w3" else 0
                one = slice(int(expert), int(expert) + 1)
                return stored, (one, slice(begin, begin + width))
        raise UserError(f"{self.folder}: tensor {name} is missing")

    def _refuse_unknown(self) -> None:
        used = {stored for stored, _ in self._where.values()}
        used |= {scale_name(name) for name in used if name.endswith(".weight")}
        unknown = sorted(self._stored.keys() - used)
        if unknown:
            raise UserError(
                f"{self.folder}: {len(unknown)} tensors are not part of the model that"
                f" {CONFIG_JSON} describes (first {unknown[0]})"
            )

    def _check_shapes(self) -> None:
        for name, shape in self.shapes.items():
            stored, part = self._where[name]
            tensor = self._stored[stored]
            found = list(tensor.shape)
            if tensor.dtype == "I8" and found:
                found[-1] *= 2  # two FP4 codes a byte
            if part is not None:
                rows = 1 if stored.endswith("down_proj") else 2
                shape = [self.config.n_routed_experts, rows * shape[0], *shape[1:]]
            if found != list(shape):
                raise UserError(
                    f"{self.folder}: tensor {stored} has shape {found}, {CONFIG_JSON} wants"
                    f" {list(shape)}"
                )
            needs_scale = tensor.dtype in ("I8", "F8_E4M3")
            if needs_scale and scale_name(stored) not in self._stored:
                raise UserError(f"{self.folder}: tensor {scale_name(stored)} is missing")


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _spellings(official: str) -> list[str]:
    """Names that a tensor may bear: official, transformers', and ``save_pretrained``'s."""
    if official.startswith("mtp.") or ".ffn.experts." in official:
        return [official, f"model.{official}"]
    saved = official.replace("embed.", "embed_tokens.").replace("hc_head_", "hc_head.hc_")
    saved = saved.replace(".attn.kv_norm.", ".attn.norm.")
    return [official, transformers_name(official), f"model.{saved}"]


def _read_config_json(path: Path) -> tuple[ModelConfig, QuantConfig | None]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it holds a {type(values).__name__}")
    try:
        theirs = is_transformers_config(values)
        config = (from_transformers_config if theirs else ModelConfig.from_official)(values)
        quant = QuantConfig(**values[QUANT_KEY]) if values.get(QUANT_KEY) else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    return config, quant


def quant_values(quant: QuantConfig | None) -> dict[str, Any] | None:
    """What ``config.json`` says of the casts."""
    if quant is None:
        return None
    values = {k: v for k, v in asdict(quant).items() if v is not None and k != "engine"}
    return {k: v.value if hasattr(v, "value") else v for k, v in values.items()}


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    return load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None
