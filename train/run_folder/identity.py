"""What a run is: one record, and one table that says what each use of it compares.

The record lies in the run folder (``identity.json``, folder.py) and in every checkpoint's
state, so that a bare checkpoint knows what it was trained as. Five uses compare a record with what
is asked for now:

- resume: the folder's run goes on. What changes results beyond rounding and is still to come must
  be equal; machine, layout, kernels, code and libraries are told.
- init_from: a new run starts from the weights, or evaluates them.
- evaluate: ``train.eval_only`` in the run's own folder.
- export: weights leave the run: export, scoring, text.
- ranks: the processes of one job, before the first step.

Text is compared by content (data/content.py), not by the keys that led to it. What a record does
not know (``None``; a record of before this file has no code) is not compared.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from data.cache import digest
from train.config.flat import GONE, pairs, still_to_come
from train.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1


class Use(StrEnum):
    """What a record is read for."""

    resume = "resume"
    init_from = "init_from"
    evaluate = "evaluate"
    export = "export"
    ranks = "ranks"


class Severity(StrEnum):
    """What becomes of a difference."""

    refuse = "refuse"
    tell = "tell"
    ignore = "ignore"


@dataclass(frozen=True)
class UseRule:
    """What each use makes of a difference in the keys that a pattern matches."""

    pattern: str
    resume: Severity
    init_from: Severity
    evaluate: Severity
    export: Severity
    ranks: Severity

    def verdict(self, use: Use) -> Severity:
        """For one use."""
        return getattr(self, use.value)


_NO, SAY, ANY = Severity.refuse, Severity.tell, Severity.ignore
# The first row that matches a key decides. Keys are those of the config and, of the other fields of
# the record, FIELD.KEY; the content of a source is data.sources.NAME.content.KEY.
TABLE = tuple(UseRule(*row) for row in (
    # pattern                        resume init_from evaluate export ranks
    ("tokenizer.*",                  _NO, _NO, _NO, _NO, _NO),
    ("data.sources.*.content.store", ANY, ANY, ANY, ANY, ANY),  # in old records only
    ("data.sources.*.content.*",     _NO, ANY, ANY, ANY, _NO),
    ("precision.*",                  _NO, ANY, ANY, ANY, _NO),
    ("code.source_sha256",           SAY, ANY, ANY, ANY, _NO),
    ("code.*",                       ANY, ANY, ANY, ANY, ANY),  # the sources' hash decides
    ("libraries.*",                  SAY, ANY, ANY, ANY, _NO),
    ("layout.*",                     SAY, ANY, ANY, ANY, _NO),
    ("kernels.*",                    SAY, ANY, ANY, ANY, _NO),
    # The model: what may differ where weights are taken over gives their tensors no other meaning.
    ("model.name",                   _NO, ANY, ANY, ANY, _NO),
    ("model.scale",                  _NO, ANY, ANY, ANY, _NO),
    ("model.kernels",                SAY, ANY, ANY, ANY, _NO),
    ("model.deterministic",          SAY, ANY, ANY, ANY, _NO),
    ("model.loss_chunk_tokens",      SAY, ANY, ANY, ANY, _NO),
    ("model.initializer_range",      _NO, ANY, ANY, ANY, _NO),
    ("model.hc_identity_base",       _NO, ANY, ANY, ANY, _NO),
    ("model.hc_fn_gain",             _NO, ANY, ANY, ANY, _NO),
    ("model.max_position_embeddings", _NO, SAY, SAY, _NO, _NO),
    ("model.rope_scaling.*",         _NO, SAY, SAY, _NO, _NO),
    ("model.yarn_from_seq_len",      _NO, SAY, SAY, _NO, _NO),
    ("model.index_topk",             _NO, SAY, SAY, _NO, _NO),
    ("model.*",                      _NO, _NO, _NO, _NO, _NO),
    # Data: the tokenizer and the content of the sources say what these keys led to.
    ("data.cache_dir",               ANY, ANY, ANY, ANY, ANY),
    ("data.workers",                 ANY, ANY, ANY, ANY, ANY),
    ("data.tokenizer",               ANY, ANY, ANY, ANY, _NO),
    ("data.vocab_size",              ANY, ANY, ANY, ANY, _NO),
    ("data.sources.*.weight",        _NO, ANY, ANY, ANY, _NO),
    ("data.sources.*.min_tokens",    _NO, ANY, ANY, ANY, _NO),
    ("data.sources.*.long_t*",       _NO, ANY, ANY, ANY, _NO),
    ("data.sources.*",               ANY, ANY, ANY, ANY, _NO),
    ("data.validation.seed",         SAY, ANY, ANY, ANY, _NO),  # order of the evaluated rows
    ("data.validation.*",            ANY, ANY, ANY, ANY, _NO),
    # How far the run goes, how it is computed, watched and kept.
    ("train.steps",                  SAY, ANY, ANY, ANY, _NO),
    ("engine.*",                     SAY, ANY, ANY, ANY, _NO),
    ("parallel.*",                   SAY, ANY, ANY, ANY, _NO),
    ("train.device",                 SAY, ANY, ANY, ANY, _NO),
    ("train.micro_batch_size",       SAY, ANY, ANY, ANY, _NO),
    ("train.stages*.micro_batch_size", SAY, ANY, ANY, ANY, _NO),
    ("train.stages*.cp",             SAY, ANY, ANY, ANY, _NO),
    ("train.activation_checkpoint",  SAY, ANY, ANY, ANY, _NO),
    ("train.compile",                SAY, ANY, ANY, ANY, _NO),
    ("train.recovery.*",             SAY, ANY, ANY, ANY, _NO),
    ("train.eval_tokens",            SAY, ANY, ANY, ANY, _NO),
    ("train.final_eval_tokens",      SAY, ANY, ANY, ANY, _NO),
    ("train.eval_*",                 ANY, ANY, ANY, ANY, _NO),
    ("train.probe_every",            ANY, ANY, ANY, ANY, _NO),
    ("train.checkpoint_every",       ANY, ANY, ANY, ANY, _NO),
    ("train.async_checkpoint",       ANY, ANY, ANY, ANY, _NO),
    ("train.keep_*",                 ANY, ANY, ANY, ANY, _NO),
    ("train.time_limit_seconds",     ANY, ANY, ANY, ANY, _NO),
    ("train.log_*",                  ANY, ANY, ANY, ANY, _NO),
    ("train.weights",                _NO, ANY, ANY, ANY, _NO),
    ("train.monitor_every",          ANY, ANY, ANY, ANY, _NO),
    ("train.profile_*",              ANY, ANY, ANY, ANY, _NO),
    ("run_dir",                      ANY, ANY, ANY, ANY, _NO),
    ("wandb.*",                      ANY, ANY, ANY, ANY, _NO),
    ("sample.*",                     ANY, ANY, ANY, ANY, _NO),
    ("tensorboard",                  ANY, ANY, ANY, ANY, _NO),
    ("dry_run",                      ANY, ANY, ANY, ANY, _NO),
    ("init_from",                    _NO, ANY, _NO, ANY, _NO),
    ("*",                            _NO, ANY, ANY, ANY, _NO),  # whatever a later key may mean
))  # fmt: skip


@dataclass(frozen=True)
class RunIdentity:
    """The record. A field is None where it is not known.

    Attributes:
        config: every key with its value, flat: ``train.stages[0].lr``.
        tokenizer: hash, vocabulary size, special ids.
        sources: content of each source (data/content.py).
        code: commit, hash of the sources.
        libraries: versions of what shapes data.
        layout: degrees of parallelism.
        kernels: which, and on what device.
        precision: of compute and of the head, resolved.
    """

    config: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Any] | None = None
    sources: Mapping[str, Any] | None = None
    code: Mapping[str, Any] | None = None
    libraries: Mapping[str, Any] | None = None
    layout: Mapping[str, Any] | None = None
    kernels: Mapping[str, Any] | None = None
    precision: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """For ``identity.json`` and a checkpoint's state."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, where: str) -> RunIdentity:
        """The record that :meth:`as_json` gave.

        Args:
            content: parsed JSON.
            where: file, for the message.

        Raises:
            UserError: it is none, or of another format.
        """
        if not isinstance(content, dict) or "format" not in content:
            raise UserError(f"{where} holds no record of a run")
        if content["format"] != FORMAT:
            raise UserError(
                f"{where} has format {content['format']}, this code reads format {FORMAT}"
            )
        found = {f.name: content.get(f.name) for f in fields(cls)}
        for name, value in found.items():
            if not (value is None or isinstance(value, dict)):
                raise UserError(f"{where}: {name} is a {type(value).__name__}, not a record")
        return cls(**found)

    def continuing(self, recorded: RunIdentity) -> RunIdentity:
        """The record of a run that goes on: its weights came from where the earlier one says."""
        if self.config is None or recorded.config is None:
            return self
        came_from = {"init_from": recorded.config.get("init_from", "")}
        return replace(self, config={**self.config, **came_from})

    def digest(self) -> str:
        """Equal for equal records."""
        return digest(self.as_json())

    def groups(self) -> dict[str, dict[str, Any]]:
        """What is known, by the key under which the table has it, field by field."""
        found = {"config": dict(self.config)} if self.config is not None else {}
        for name in ("tokenizer", "code", "libraries", "layout", "kernels", "precision"):
            field = getattr(self, name)
            if field is not None:
                found[name] = {f"{name}.{key}": value for key, value in field.items()}
        if self.sources is not None:
            found["sources"] = {"data.sources": list(self.sources)} | {
                f"data.sources.{name}.content.{key}": value
                for name, content in self.sources.items()
                for key, value in content.items()
            }
        return found


@dataclass(frozen=True)
class Difference:
    """One key in which a record and what is asked for differ."""

    key: str
    before: Any
    now: Any


# ---- comparing -----------------------------------------------------------------------------------
def check(
    use: Use,
    recorded: RunIdentity,
    now: RunIdentity,
    where: str,
    done_tokens: int = 0,
    tell: bool = True,
) -> None:
    """Refuse what the table refuses, naming the first difference, and tell what it tells.

    Args:
        use: column of the table.
        recorded: what was trained.
        now: what is asked for.
        where: what holds the record, for the message: ``run_dir=runs/mine``.
        done_tokens: position that training has reached; what only steps before it read is over.
        tell: whether to log what the table tells.

    Raises:
        UserError: names the key and both values.
    """
    found = differences(use, recorded, now, done_tokens)
    if refused := found[Severity.refuse]:
        first = refused[0]
        more = ", ".join(d.key for d in refused[1:6]) + ", ..." * (len(refused) > 6)
        others = f" (so do {len(refused) - 1} more: {more})" if len(refused) > 1 else ""
        raise UserError(
            f"{where} holds a run with {first.key}={_shown(first.before)}, but now"
            f" {first.key}={_shown(first.now)}{_origin(first, recorded, now)}{others}: "
            + _ADVICE[use]
            + _recipe(use, first.key, where)
        )
    if tell and (told := found[Severity.tell]):
        shown = ", ".join(
            f"{d.key} {_shown(d.before)} -> {_shown(d.now)}{_NOTES.get(d.key, '')}" for d in told
        )
        log.info("%s: differs from what was recorded, as it may: %s", where, shown)


_NOTES = {"train.steps": " (schedules end there, unless stages fix their end)"}
_ADVICE = {
    Use.resume: "give another run_dir",
    Use.init_from: "weights mean something only to the model and tokenizer they were trained with",
    Use.evaluate: "give another run_dir, or the same model and tokenizer",
    Use.export: "the weights belong to the first",
    Use.ranks: "all ranks must be the same",
}


def _recipe(use: Use, key: str, where: str) -> str:
    """How a run goes on where its own folder may not: from its weights, in another one."""
    if use is not Use.resume or row_of(key).init_from is Severity.refuse:
        return ""
    recorded = where.removeprefix("run_dir=")
    return f"; there init_from={recorded} goes on from the weights of this one"


def check_ranks(records: Sequence[RunIdentity]) -> None:
    """Refuse ranks that differ from rank 0 in anything that the table refuses.

    Args:
        records: of every rank, in order.

    Raises:
        UserError: names each rank that differs, its first key and both values.
    """
    told = []
    for rank, record in enumerate(records):
        refused = differences(Use.ranks, records[0], record, 0)[Severity.refuse]
        if refused:
            d = refused[0]
            told.append(f"rank {rank} has {d.key}={_shown(d.now)}, rank 0 {_shown(d.before)}")
    if told:
        raise UserError("ranks differ: " + "; ".join(told))


def differences(
    use: Use, recorded: RunIdentity, now: RunIdentity, done_tokens: int = 0
) -> dict[Severity, list[Difference]]:
    """All differences, by what the table makes of them; arguments as of :func:`check`."""
    found: dict[Severity, list[Difference]] = {verdict: [] for verdict in Severity}
    before_of, now_of = recorded.groups(), now.groups()
    for name in (name for name in now_of if name in before_of):
        before, after = before_of[name], now_of[name]
        if name == "config":
            pairs = _config_pairs(use, before, after, done_tokens)
        else:  # None: not known
            shared = ((key, before.get(key), value) for key, value in after.items())
            pairs = ((key, a, b) for key, a, b in shared if a is not None and b is not None)
        for key, a, b in pairs:
            if a != b:
                verdict = Severity.tell if b is GONE else row_of(key).verdict(use)
                found[verdict].append(Difference(key, a, b))
    return found


def row_of(key: str) -> UseRule:
    """The row that decides about a key."""
    return next(row for row in TABLE if fnmatchcase(key, row.pattern))


def _config_pairs(
    use: Use, before: dict[str, Any], now: dict[str, Any], done_tokens: int
) -> Iterator[tuple[str, Any, Any]]:
    """Keys with both values, without those by which nothing is asked for."""
    if use is Use.resume:
        before, now = still_to_come(before, now, done_tokens)
    for key, a, b in pairs(before, now):
        if use is not Use.ranks and key == "init_from" and done_tokens and not b:
            continue  # the run has weights of its own
        yield key, a, b


# ---- messages ------------------------------------------------------------------------------------
def _shown(value: Any) -> str:
    """A value in a message: hashes by their beginning, long lists cut."""
    text = value if isinstance(value, str) else str(value)
    if re.fullmatch(r"[0-9a-f]{32,}", text):
        return text[:12]
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _origin(difference: Difference, before: RunIdentity, now: RunIdentity) -> str:
    """The keys that led to a tokenizer, behind its hash."""
    if not difference.key.startswith("tokenizer."):
        return ""
    asked = [(r.config or {}).get("data.tokenizer") for r in (before, now)]
    return f" (data.tokenizer={asked[0]}, now {asked[1]})" if all(asked) else ""


# ---- old records ---------------------------------------------------------------------------------
def recorded_in(
    state: Mapping[str, Any], config: Mapping[str, Any] | None, now: RunIdentity, where: str
) -> RunIdentity:
    """The record in a checkpoint's state.

    Args:
        state: of the checkpoint.
        config: flat, of the run folder around it: stands for the record that older code did not
            write; None: there is none.
        now: what is asked for; a source that an older hash shows to be equal is taken from it.
        where: the checkpoint, for messages.

    Raises:
        UserError: the record is of another format.
    """
    if "identity" in state:
        return RunIdentity.from_json(state["identity"], where)
    manifest = state.get("loader", {}).get("manifest")
    if manifest is None:
        return RunIdentity(config=config)
    known = now.sources or {}
    sources = {n: _content(old, known.get(n, {})) for n, old in manifest["sources"].items()}
    return RunIdentity(config=config, tokenizer=manifest["tokenizer"], sources=sources)


def _content(old: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A source as older code recorded it: the hash of a store; of streams paths, sizes, times."""
    if "streamed" in old:
        return dict(old)
    stream = old.get("stream")
    if stream is None:
        equal, found = old["store"] == now.get("store"), {"train": old["store"]}
    else:
        found = {
            "repository": "" if "files" in stream else stream["path"],
            "files": [[size, None] for _, size, _ in stream.get("files", [])],
        }
        sizes = [[size, None] for size, _ in now.get("files", [])]
        equal = (found["repository"], found["files"]) == (now.get("repository"), sizes)
    unknown = dict.fromkeys(now) | {"streamed": stream is not None}
    return dict(now) if equal else unknown | found
