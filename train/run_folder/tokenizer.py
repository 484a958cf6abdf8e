"""A run that starts from another one's weights reads text with that one's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

from data.config import SourceKind
from data.tokenizer import Tokenizer, folder_tokenizer
from parallel.launch import launched_rank
from train.config.schema import RunConfig
from train.run_folder.folder import CONFIG, holds_run, read_flat_config

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
    for folder in (source, *source.absolute().parents[:2]):  # a run, or one of its checkpoints
        if (found := folder_tokenizer(folder)) is not None:
            if launched_rank() == 0:
                log.info("data.tokenizer=bpe: that of init_from=%s is taken", run.init_from)
            return found
    return None
