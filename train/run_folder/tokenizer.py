"""A run that starts from another one's weights reads text with that one's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

from data.config import SourceKind
from data.prepare import open_store
from data.tokenizer import Tokenizer, folder_tokenizer, load_tokenizer
from parallel.launch import launched_rank
from train.config.schema import RunConfig
from train.errors import UserError
from train.run_folder.folder import CONFIG, holds_run, read_flat_config
from train.run_folder.origin import same_ids

log = logging.getLogger(__name__)


def inherited_tokenizer(run: RunConfig) -> Tokenizer | None:
    """The tokenizer that the weights of ``init_from`` were trained with.

    Taken where ``data.tokenizer=bpe`` would train another one, which those weights could not read;
    one that is named, or that of a token store, is compared later and refused where it differs.

    Returns:
        None: the run has no such weights, or names a tokenizer.

    Raises:
        ConfigError: it cannot be read.
    """
    kinds = {source.kind for source in run.data.named_sources().values()}
    if run.data.tokenizer != "bpe" or SourceKind.store in kinds:
        return None
    own, source = Path(run.run_dir), Path(run.init_from)
    if holds_run(own):  # goes on, maybe without the folder that it came from
        begun = read_flat_config(own / CONFIG).get("init_from")
        return folder_tokenizer(own) if begun else None
    if not run.init_from:
        return None
    found = _around(source)
    if found is not None and launched_rank() == 0:
        log.info("data.tokenizer=bpe: that of init_from=%s is taken", run.init_from)
    return found


def check_tokenizer(run: RunConfig) -> None:
    """Refuse a tokenizer that the weights of ``init_from`` cannot read, before any text is read.

    Raises:
        ConfigError: one of both cannot be read.
        UserError: names both vocabularies, and what to give instead.
    """
    known = _around(Path(run.init_from))
    if known is None:
        return
    theirs = f"the weights of init_from={run.init_from} read another one, of {known.vocab_size} ids"
    if run.data.tokenizer != "bpe":
        ours = load_tokenizer(run.data.tokenizer)
        if not same_ids(ours, known):
            raise UserError(
                f"data.tokenizer={run.data.tokenizer} has {ours.vocab_size} ids, but {theirs}:"
                " leave data.tokenizer=bpe, which takes that one here"
            )
        return
    for name, source in run.data.named_sources().items():
        if source.kind is not SourceKind.store:
            continue
        ours = open_store(name, source).tokenizer
        if not same_ids(ours, known):
            raise UserError(
                f"data.sources.{name}.path={source.path} was prepared with a tokenizer of"
                f" {ours.vocab_size} ids, but {theirs}: v4 prepare with --tokenizer {run.init_from}"
                " makes a store that they read"
            )


def _around(source: Path) -> Tokenizer | None:
    """The tokenizer in a run's folder, for the folder itself or one of its checkpoints."""
    for folder in (source, *source.absolute().parents[:2]):
        if (found := folder_tokenizer(folder)) is not None:
            return found
    return None
