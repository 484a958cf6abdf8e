"""Reads ``config.json`` and safetensors: official names, plain or quantised, or transformers'.

``transformers`` writes a third kind of names with ``save_pretrained``; it is read too. Where there
is an index, it says which files count and which tensor lies in which, as it does for every other
reader.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.tokenizer import Tokenizer, folder_tokenizer
from model.state_dict import official_items, transformers_name
from quant.export import INDEX, scale_name
from quant.importing import decode, scale_shape
from train.config.model_json import CONFIG_JSON, read_config_json
from train.errors import UserError, one_line
from train.exchange.model_card import Provenance
from train.exchange.model_source import check_values, meta_model

log = logging.getLogger(__name__)

_SINGLE = "model.safetensors"  # what other readers prefer to an index
_PLAIN, _TABLES = ("F32", "BF16", "F16"), ("I64", "I32")
_QUANTISED, _SCALE = ("I8", "F8_E4M3"), "F8_E8M0"
_OPEN_SHARDS = 2  # a weight's scale, or the next tensor, may lie in the next shard


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies, and what its file's header says of it."""

    shard: Path
    dtype: str
    shape: list[int]


class FolderSource:
    """A folder of safetensors.

    Args:
        folder: of the files.

    Raises:
        UserError: a tensor is missing, not known, or of another shape or dtype; a file cannot be
            read, or contradicts another.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._stored = _find_tensors(folder)
        self.config, self.quant = read_config_json(folder / CONFIG_JSON)
        depths = self.config.num_nextn_predict_layers
        if depths and not any(name.startswith("mtp.") for name in self._stored):
            log.warning("%s holds no MTP block: the model is read without", folder)
            ratios = self.config.compress_ratios[: self.config.num_hidden_layers]
            self.config = replace(
                self.config, num_nextn_predict_layers=0, compress_ratios=list(ratios)
            )
        self.shapes = {n: t.shape for n, t in official_items(meta_model(self.config).state_dict())}
        self._where = {name: self._resolve(name) for name in self.shapes}
        for name in self.shapes:
            self._check(name)
        self._refuse_unknown()
        self.origin = f"sha256 {self._digest()}"
        self.provenance = Provenance()

    def read(self, name: str) -> Tensor:
        """See :class:`ModelSource`."""
        stored, part = self._where[name]
        if part is not None:
            value = self._file(stored).get_slice(stored)[part].squeeze(0)
        else:
            value = self._file(stored).get_tensor(stored)
            if self._stored[stored].dtype in _QUANTISED:
                scale = scale_name(stored)
                value = decode(stored, value, self._file(scale).get_tensor(scale))
        check_values(self.folder, stored, value, self.config)
        return value

    def tokenizer(self) -> Tokenizer | None:
        """See :class:`ModelSource`."""
        return folder_tokenizer(self.folder)

    def _file(self, stored: str) -> Any:
        """The file of a tensor. Few stay open: each is mapped as a whole, as memory of its own."""
        shard = self._stored[stored].shard
        if shard not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[shard] = _opened(shard)
        return self._open[shard]

    def _digest(self) -> str:
        """Of config and index, and of the shards' names, sizes and times."""
        digest = hashlib.sha256((self.folder / CONFIG_JSON).read_bytes())
        for shard in sorted({tensor.shard for tensor in self._stored.values()}):
            stat = shard.stat()
            digest.update(
                json.dumps([shard.name, stat.st_size, stat.st_mtime_ns], allow_nan=False).encode()
            )
        return digest.hexdigest()

    # ---- checks ----------------------------------------------------------------------------------
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

    def _check(self, name: str) -> None:
        """Dtype and shape of a tensor, and of its scale."""
        stored, part = self._where[name]
        tensor, wanted = self._stored[stored], list(self.shapes[name])
        known = _TABLES if name.endswith(".tid2eid") else _PLAIN
        if part is None and stored.endswith(".weight") and len(wanted) == 2:
            known += _QUANTISED
        self._check_dtype(stored, known)
        if tensor.dtype in _QUANTISED:
            self._check_scale(stored, wanted)
        if part is not None:
            rows = 1 if stored.endswith("down_proj") else 2
            wanted = [self.config.n_routed_experts, rows * wanted[0], *wanted[1:]]
        found = list(tensor.shape)
        if tensor.dtype == "I8" and found:
            found[-1] *= 2  # two FP4 codes a byte
        self._check_shape(stored, found, wanted)

    def _check_scale(self, weight: str, shape: list[int]) -> None:
        scale, dtype = scale_name(weight), self._stored[weight].dtype
        if scale not in self._stored:
            raise UserError(
                f"{self.folder}: tensor {scale} is missing (its weight has dtype {dtype})"
            )
        self._check_dtype(scale, (_SCALE,))
        wanted = scale_shape(shape[0], shape[1], packed=dtype == "I8")
        self._check_shape(scale, self._stored[scale].shape, list(wanted))

    def _check_dtype(self, stored: str, known: tuple[str, ...]) -> None:
        dtype = self._stored[stored].dtype
        if dtype not in known:
            raise UserError(
                f"{self.folder}: tensor {stored} has dtype {dtype}, known for it are"
                f" {', '.join(known)}"
            )

    def _check_shape(self, stored: str, found: list[int], wanted: list[int]) -> None:
        if found != wanted:
            raise UserError(
                f"{self.folder}: tensor {stored} has shape {found}, {CONFIG_JSON} wants {wanted}"
            )

    def _refuse_unknown(self) -> None:
        used = {stored for stored, _ in self._where.values()}
        quantised = {name for name in used if self._stored[name].dtype in _QUANTISED}
        for weight in used - quantised:
            if weight.endswith(".weight") and scale_name(weight) in self._stored:
                raise UserError(
                    f"{self.folder}: tensor {scale_name(weight)} is there, but {weight} has dtype"
                    f" {self._stored[weight].dtype}, which has no scale"
                )
        unknown = sorted(self._stored.keys() - used - {scale_name(name) for name in quantised})
        if unknown:
            raise UserError(
                f"{self.folder}: {len(unknown)} tensors are not part of the model that"
                f" {CONFIG_JSON} describes (first {unknown[0]})"
            )


def _find_tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor that counts: where there is an index, those that it names."""
    shards = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    index = _read_index(folder, shards)
    if index is not None:
        stray = sorted(shards.keys() - set(index.values()))
        if stray:
            log.warning("%s: not read, since %s does not name them: %s",
                        folder, INDEX, ", ".join(stray))  # fmt: skip
        shards = {name: shards[name] for name in sorted(set(index.values()))}
    found: dict[str, _Tensor] = {}
    for shard in shards.values():
        for name, tensor in _header(shard).items():
            if index is not None and index.get(name) != shard.name:
                continue
            if name in found:
                raise UserError(
                    f"{folder}: tensor {name} is in {found[name].shard.name} and in {shard.name},"
                    f" and there is no {INDEX}"
                )
            found[name] = tensor
    absent = sorted((index or {}).keys() - found.keys())
    if index is not None and absent:
        raise UserError(
            f"{folder}: {INDEX} names tensor {absent[0]} in {index[absent[0]]}, which does not hold"
            " it"
        )
    return found


def _header(shard: Path) -> dict[str, _Tensor]:
    file = _opened(shard)
    views = {name: file.get_slice(name) for name in file.keys()}
    return {n: _Tensor(shard, v.get_dtype(), list(v.get_shape())) for n, v in views.items()}


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{shard} cannot be read: {one_line(error)}") from error


def _read_index(folder: Path, shards: dict[str, Path]) -> dict[str, str] | None:
    """Tensor -> file name; None without an index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text("utf-8"))["weight_map"]
        good = all(isinstance(name, str) for name in index.values())
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not good:
        raise UserError(f"{path} cannot be read: its weight_map must name files")
    absent = sorted(set(index.values()) - shards.keys())
    if absent:
        raise UserError(f"{folder}: {INDEX} names {absent[0]}, which is missing")
    if _SINGLE in shards.keys() - set(index.values()):
        raise UserError(
            f"{folder} holds {_SINGLE} and {INDEX}, which does not name it: other readers take the"
            " one or the other, so remove one"
        )
    return index


def _spellings(official: str) -> list[str]:
    """Names that a tensor may bear: official, transformers', and ``save_pretrained``'s."""
    if official.startswith("mtp.") or ".ffn.experts." in official:
        return [official, f"model.{official}"]
    saved = official.replace("embed.", "embed_tokens.").replace("hc_head_", "hc_head.hc_")
    saved = saved.replace(".attn.kv_norm.", ".attn.norm.")
    return [official, transformers_name(official), f"model.{saved}"]
