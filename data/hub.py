"""Documents of a dataset of the Hugging Face hub, or of a dataset folder, through ``datasets``."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import DatasetCard, constants

from data.cache import digest, locked, raise_if_full
from data.config import SourceConfig
from data.errors import ConfigError
from data.files import shown
from data.network import HubAnswer, ask_hub, go_offline, reason_of

log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATIENCE = 10.0  # seconds that the hub may take to tell a revision


class HubDocuments:
    """One column of a ``datasets`` table.

    Args:
        name: of the source.
        source: its config.
        folder: of the library's cache for this content: the library knows files by their times.

    Raises:
        ConfigError: it cannot be read, or the column is not there or holds no text.
    """

    at_once = 256
    bad_lines = 0

    def __init__(self, name: str, source: SourceConfig, folder: str) -> None:
        self._key = f"data.sources.{name}"
        self._column = source.text_key
        table = _load(self._key, source, streaming=False, cache_dir=folder)
        _check_columns(table.column_names, self._column, self._key)
        self._table = table.select_columns([self._column])

    def __len__(self) -> int:
        return len(self._table)

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents."""
        rows = self._table[index_N.tolist()][self._column]
        return [_as_text(row, self._key, self._column) for row in rows]


class HubRows:
    """The same in order, without a copy on the disk (a part of data.sources.DocumentStream)."""

    def __init__(self, name: str, source: SourceConfig) -> None:
        self._key = f"data.sources.{name}"
        self._what = f"{self._key}.path={shown(source.path)}"
        self._column = source.text_key
        self._table = _load(self._key, source, streaming=True)
        if self._table.column_names:
            _check_columns(self._table.column_names, self._column, self._key)
            self._table = self._table.select_columns([self._column])
        self._start = self._table.state_dict()

    def rows(self, state: Any) -> Iterator[str]:
        """Documents from a state on; None: from the start."""
        self._table.load_state_dict(self._start if state is None else state)
        return self._iterate()

    def state(self) -> Any:
        """The library's state behind the last document."""
        return self._table.state_dict()

    def _iterate(self) -> Iterator[str]:
        number = 0
        try:
            for row in self._table:
                _check_columns(list(row), self._column, self._key)
                yield _as_text(row[self._column], self._key, self._column)
                number += 1
        except ConfigError:
            raise
        except Exception as error:  # the library raises many kinds
            raise ConfigError(
                f"{self._what}: cannot be read after {number} documents: {reason_of(error)}"
            ) from error


def hub_revision(source: SourceConfig) -> str | None:
    """The commit that a hub's dataset stands at; None, and a line, where the hub cannot be asked.

    Args:
        source: names the dataset, and maybe a branch, a tag or the commit itself.
    """
    if _COMMIT.fullmatch(source.revision):
        return source.revision
    from huggingface_hub import HfApi  # noqa: PLC0415 - only for a hub's datasets

    answer = ask_hub("dataset", source.path)
    try:
        if reason := answer.away or answer.refused:
            raise OSError(reason)
        info = HfApi().dataset_info(
            source.path, revision=source.revision or None, timeout=_PATIENCE
        )
    except Exception as error:  # offline, a mirror without this call, no permission
        log.info(
            "data: the hub does not tell the revision of %s, so it is not compared with an earlier"
            " one (%s)", source.path, reason_of(error)[:200],
        )  # fmt: skip
        return None
    return info.sha


def cached_revision(source: SourceConfig, folder: Path) -> str:
    """The revision whose copy in the cache is right: the hub's own, or the last one that was seen.

    Args:
        source: a dataset of the hub.
        folder: of the cache; the commit that the hub tells is remembered in it.
    """
    seen = folder / f"revision-{digest([source.path, source.revision])[:24]}"
    commit = hub_revision(source)
    if commit is not None:
        if not seen.is_file() or seen.read_text() != commit:
            with locked(seen, "data.cache_dir"):
                seen.with_suffix(".new").write_text(commit)
                seen.with_suffix(".new").replace(seen)
        return commit
    return seen.read_text() if seen.is_file() else source.revision


def _load(key: str, source: SourceConfig, **options: Any) -> Any:
    import datasets  # noqa: PLC0415 - takes a second, which the default corpus need not wait for

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come in our one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    here = Path(source.path).exists()
    answer = HubAnswer() if here else ask_hub("dataset", source.path)
    if answer.refused:
        raise ConfigError(f"{key}.path={shown(source.path)}: {answer.refused}")
    if away := answer.away:
        go_offline(away)
    offline = not here and constants.HF_HUB_OFFLINE
    try:
        return datasets.load_dataset(
            source.path,
            **(_part_of_folder(key, source) if here else {"name": source.subset or None}),
            split=source.split,
            revision=source.revision or None,
            **options,
        )
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds, some bare
        raise_if_full(error, options.get("cache_dir", "the hub's cache"), "data.cache_dir")
        reason = f"{away}, and its cache has no such data" if away else reason_of(error)
        raise ConfigError(
            f"{key}.path={shown(source.path)} cannot be read as hub: {reason}"
            f"{_how_to_fetch(key, source) if offline else ''}"
        ) from error


def _part_of_folder(key: str, source: SourceConfig) -> dict[str, Any]:
    """Files of a subset as the card of a folder names them; the others need not be there.

    The library looks for files of the first subset whichever is asked for.

    Raises:
        ConfigError: the folder has no card, or its card no such subset.
    """
    if not source.subset:
        return {}
    card = Path(source.path, "README.md")
    parts = DatasetCard.load(card).data.to_dict().get("configs") or [] if card.is_file() else []
    named = {part["config_name"]: part.get("data_files") for part in parts}
    if source.subset not in named:
        raise ConfigError(
            f"{key}.subset={source.subset} is none of those that {shown(str(card))} names"
            f" ({', '.join(named) or 'none'}): bring the dataset's README.md, or give the folder of"
            f" its files with {key}.subset=''"
        )
    files = named[source.subset]
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        return {"name": source.subset}
    return {"data_files": {file["split"]: file["path"] for file in files}}


def _how_to_fetch(key: str, source: SourceConfig) -> str:
    """What leads to a dataset of the hub that cannot be reached."""
    subset = f" --subset {source.subset}" if source.subset else ""
    column = f" --text-key {source.text_key}" if source.text_key != "text" else ""
    return (
        f"; where there is a network: v4 prepare {source.path}{subset}{column} --out STORE, then"
        " here data=store data.sources.store.path=STORE; of a copy of its files (hf download) give"
        f" {key}.path=FOLDER"
    )


def _check_columns(columns: list[str], column: str, key: str) -> None:
    if column not in columns:
        raise ConfigError(f"{key}.text_key={column} is not among the columns {', '.join(columns)}")


def _as_text(value: Any, key: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ConfigError(f"{key}.text_key={column} must hold text, a document holds {kind}")
    return value
