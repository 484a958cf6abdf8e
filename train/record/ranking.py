"""Runs side by side, finished or not: how far each came, which are one configuration, who leads.

They are ranked by bits per byte, which compare across tokenizers where the same held-out text was
read; the first token of a document, which is never a target, is left out of each. Runs that read
other text (another split, or one that ``train.eval_tokens`` cut after other bytes) have a ranking
of their own. Losses in nats per token compare only where tokenizer and validation text are the
same, and give the same order there; they are the measure where they do and a run has no bits per
byte.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.config.flat import flatten
from train.errors import UserError, one_line
from train.record.metrics import Record, read_metrics
from train.record.receipt import RECEIPT
from train.record.report import EVALUATION
from train.run_folder.folder import CONFIG, IDENTITY, METRICS
from train.run_folder.lock import is_held

LOSS, BITS = "val_loss", "val_bits_per_byte"
OF_NO_EFFECT = ("run_dir", "wandb.", "tensorboard", "sample.", "train.log_every")
_SEEDS = ("seed", "init_seed_offset")
_SEED_IN_NAME = tuple(f"{key}=" for key in _SEEDS)  # of a sweep's folder
_OF_A_RUN = (IDENTITY, METRICS, RECEIPT, EVALUATION)  # beside its config: one of them
OTHER_TEXT = (
    "evaluated on other text, so not ranked with those above; the whole split is the same for all:"
    " init_from=RUN train.eval_only=true train.final_eval_tokens=0 run_dir=NEW, and the rest as it"
    " was"
)
_MOST_KEYS = 4  # in a label
# of a receipt: what is read as a record of more
_RECORDS = ("metrics", "final_metrics", "code", "layout", "environment", "data.sources.*")


@dataclass(frozen=True)
class RunSummary:
    """One run, as far as it came.

    Attributes:
        folder: where it lies.
        config: by dotted keys, as it lies there.
        receipt: what it left at its end, or at its last stop; empty: nothing yet.
        identity: what it is, written at its start; empty of an old run.
        records: its metrics; empty of an evaluation.
        state: finished, running or stopped.
    """

    folder: Path
    config: Mapping[str, Any]
    receipt: Mapping[str, Any]
    identity: Mapping[str, Any]
    records: list[Record]
    state: str

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.records[-1]["step"]) if self.records else 0

    def value(self, measure: str) -> float | None:
        """Of the newest evaluation; None: there was none yet. Infinite where it was not finite.

        Raises:
            UserError: a file says something else than a number.
        """
        record = self._newest(measure)
        if measure not in record:
            return None
        value = record[measure]
        try:
            return math.inf if value is None else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{self.folder} is damaged: {measure} is no number") from error

    def _newest(self, measure: str) -> Mapping[str, Any]:
        """The newest record that holds a measure; empty: none does."""
        records = (self.receipt.get("metrics"), *reversed(self.records), self._final())
        return next((record for record in records if record and measure in record), {})

    def _final(self) -> Mapping[str, Any]:
        return self.receipt.get("final_metrics") or {}

    def aspect(self, name: str) -> Mapping[str, Any]:
        """Code, data, layout or environment, as recorded; empty: it was not."""
        if name in self.receipt:
            return self.receipt[name] or {}
        if name == "data" and self.identity:
            return {key: self.identity.get(key) for key in ("tokenizer", "sources")}
        return self.identity.get(name) or {}

    @property
    def tokenizer(self) -> str:
        """Equal where ids mean the same; empty: it is not recorded."""
        tokenizer = self.aspect("data").get("tokenizer")
        return json.dumps(tokenizer, sort_keys=True, allow_nan=False) if tokenizer else ""

    @property
    def is_evaluated(self) -> bool:
        """Whether anything was measured on held-out text."""
        return bool(self._newest(BITS) or self._newest(LOSS))

    @property
    def text_read(self) -> str:
        """Hash of the held-out text that the newest evaluation read; empty: it is not recorded."""
        return str((self._newest(BITS) or self._newest(LOSS)).get("val_text", ""))

    @property
    def text_asked(self) -> str:
        """Equal where the same rows of held-out tokens are asked for."""
        sources = self.aspect("data").get("sources") or {}
        held = {name: (s or {}).get("validation") for name, s in sources.items()}
        tokens = self.config.get("train.eval_tokens")
        if self.receipt.get("metrics"):  # an evaluation: on the rows of a run's last one
            final = self.config.get("train.final_eval_tokens")
            tokens = tokens if final is None else final
        keys = ("train.seq_len", "data.validation.bytes")
        asked = [held, self.tokenizer, tokens, *map(self.config.get, keys)]
        return json.dumps(asked, default=str, allow_nan=False)

    @property
    def configuration(self) -> str:
        """Equal where runs differ in their seeds alone."""
        return json.dumps(
            {k: v for k, v in self.config.items() if k not in _SEEDS and has_effect(k)},
            sort_keys=True, default=str, allow_nan=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs of one configuration under several seeds.

    Attributes:
        label: what tells it from the others.
        runs: of it.
        text: equal where the same held-out text was evaluated.
    """

    label: str
    runs: tuple[RunSummary, ...]
    text: str = ""

    @property
    def seeds(self) -> int:
        """Different ones: a copy of a run is no second seed."""
        return len({tuple(run.config.get(key) for key in _SEEDS) for run in self.runs})

    @property
    def count(self) -> str:
        """Of seeds, and of runs where a seed is there more than once."""
        told = f"{self.seeds} seed" + "s" * (self.seeds > 1)
        return told if self.seeds == len(self.runs) else f"{len(self.runs)} runs of {told}"

    def values(self, measure: str) -> list[float]:
        """Of the runs that were evaluated."""
        return [v for run in self.runs if (v := run.value(measure)) is not None]

    def mean(self, measure: str) -> float:
        """Over its seeds; infinite where none was evaluated."""
        return statistics.fmean(values) if (values := self.values(measure)) else math.inf

    def shown(self, measure: str) -> str:
        """Mean, and the range of its seeds where there are several; else how far it has come."""
        values = self.values(measure)
        if not values:
            return self._shown_training()
        mean = self.mean(measure)
        told = f"{mean:.4f}" if math.isfinite(mean) else "not finite"
        several = len(values) > 1 and math.isfinite(mean)
        return f"{told} ({min(values):.4f} to {max(values):.4f})" if several else told

    def _shown_training(self) -> str:
        newest = {run.step: run.records[-1].get("loss") for run in self.runs if run.records}
        told = ", ".join(f"{v:.4f} at step {n}" for n, v in newest.items() if isinstance(v, float))
        return f"not evaluated yet (training loss {told})" if told else "not evaluated yet"


@dataclass(frozen=True)
class Ranking:
    """Groups, the best first.

    Attributes:
        measure: by which: ``val_bits_per_byte``, or ``val_loss`` where losses compare
            and a run has nothing else.
        unlike: why losses in nats per token do not compare; empty: they do.
        groups: in order; where texts differ, those of one text one after another.
    """

    measure: str
    unlike: str
    groups: tuple[Group, ...]

    @property
    def by_text(self) -> list[tuple[Group, ...]]:
        """Groups that compare: the text of most runs first, each in order."""
        return [tuple(some) for _, some in itertools.groupby(self.groups, lambda g: g.text)]


def has_effect(key: str) -> bool:
    """Whether a config key can change what is learnt."""
    return not key.startswith(OF_NO_EFFECT)


def find_runs(path: Path) -> list[Path]:
    """The run folder that a path is, or those below it (a sweep's folder).

    Raises:
        UserError: there is none.
    """
    if (path / CONFIG).is_file():
        return [path]
    found = sorted(
        p.parent for p in path.rglob(CONFIG)
        if p.parent.name[0] != "." and any((p.parent / name).is_file() for name in _OF_A_RUN)
    )  # fmt: skip
    if not found:
        raise UserError(f"{path} holds no run: no {CONFIG} in it or in a folder below")
    return found


def read_summary(folder: Path) -> RunSummary:
    """Read one run folder, whatever state it is in.

    Raises:
        UserError: a file is damaged.
    """
    names = (CONFIG, RECEIPT, EVALUATION, IDENTITY)
    files = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
    records = read_metrics(folder / METRICS)
    return summary_of(folder, files, records, is_held(folder))


def summary_of(
    folder: Path, files: Mapping[str, bytes], records: list[Record], held: bool = False
) -> RunSummary:
    """A run from its files.

    Args:
        folder: for messages and names.
        files: name -> bytes of its config, and of receipt and identity where there are any.
        records: its metrics.
        held: whether a process trains it.

    Raises:
        UserError: a file is damaged; names it.
    """
    config = _parsed(folder, files, CONFIG, yaml.safe_load)
    if not config:
        raise UserError(f"{folder / CONFIG} is damaged: it holds no config")
    name = RECEIPT if records or EVALUATION not in files else EVALUATION
    receipt = _parsed(folder, files, name, json.loads)
    if name == RECEIPT in files and type(receipt.get("finished")) is not bool:
        raise UserError(f"{folder / name} is damaged: it holds no run")
    _check_records(folder / name, receipt, _RECORDS)
    done = receipt.get("finished") is True or name == EVALUATION
    state = "running" if held else "finished" if done else "stopped"
    identity = _parsed(folder, files, IDENTITY, json.loads)
    return RunSummary(folder, flatten(config), receipt, identity, records, state)


def _check_records(path: Path, content: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a file in which something that is to hold more is a value."""
    for name in names:
        first, _, rest = name.partition(".")
        inner = content.get(first)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{path} is damaged: {first} is no record")
        if rest and inner:
            _check_records(path, inner, inner if rest == "*" else [rest])


def _parsed(folder: Path, files: Mapping[str, bytes], name: str, parse: Any) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = parse(files[name])
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder / name} is damaged: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} is damaged: it holds no record")
    return content


def run_names(runs: Sequence[RunSummary]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len({*names}) == len(names):
            return names
    return [str(run.folder) for run in runs]


def rank(runs: Sequence[RunSummary]) -> Ranking:
    """Group runs by configuration and order the groups, the lowest measure first."""
    texts = _texts(runs)
    unlike = _unlike(runs, texts)
    lacking = any(run.value(BITS) is None and run.value(LOSS) is not None for run in runs)
    measure = LOSS if lacking and not unlike else BITS
    by_configuration: dict[tuple[str, str], list[RunSummary]] = {}
    for run, text in zip(runs, texts, strict=True):
        by_configuration.setdefault((run.configuration, text), []).append(run)
    names = dict(zip((run.folder for run in runs), run_names(runs), strict=True))
    members = list(by_configuration.values())
    labels = _labels([group[0] for group in members], [_common(g, names) for g in members])
    of_text = [text for _, text in by_configuration]
    groups = [Group(*parts) for parts in zip(labels, map(tuple, members), of_text, strict=True)]
    most = {text: (-texts.count(text), texts.index(text)) for text in texts}
    order = sorted(groups, key=lambda group: (most[group.text], group.mean(measure)))
    return Ranking(measure, unlike, tuple(order))


def _texts(runs: Sequence[RunSummary]) -> list[str]:
    """Of each run, what is equal where the same held-out text was evaluated.

    An old run that recorded no hash has that of a run which asked for the same rows. One that was
    never evaluated stands with its configuration, or at the end of the first.
    """
    read = {run.text_asked: run.text_read for run in runs if run.text_read}
    texts = [run.text_read or read.get(run.text_asked, run.text_asked) for run in runs]
    known = [text for run, text in zip(runs, texts, strict=True) if run.is_evaluated]
    if not known:
        return [""] * len(runs)
    of = {run.configuration: text for run, text in zip(runs, texts, strict=True)
          if run.is_evaluated}  # fmt: skip
    first = max(known, key=known.count)
    return [text if run.is_evaluated else of.get(run.configuration, first)
            for run, text in zip(runs, texts, strict=True)]  # fmt: skip


def _unlike(runs: Sequence[RunSummary], texts: Sequence[str]) -> str:
    if len({run.tokenizer for run in runs if run.tokenizer}) > 1:
        return "the tokenizers differ"
    return "the evaluated texts differ" if len({*texts}) > 1 else ""


def _common(runs: Sequence[RunSummary], names: Mapping[Path, str]) -> str:
    """A name of several seeds: what their folders' names have in common, without the seeds'."""
    if len(runs) == 1:
        return names[runs[0].folder]
    parts = [[part for part in run.folder.name.split(",") if not part.startswith(_SEED_IN_NAME)]
             for run in runs]  # fmt: skip
    if parts[0] and all(part == parts[0] for part in parts):
        return ",".join(parts[0])
    parents = {run.folder.resolve().parent.name for run in runs}
    if not any(parts) and len(parents) == 1:
        return parents.pop()
    return f"{names[runs[0].folder]} and {len(runs) - 1} more"


def _labels(runs: Sequence[RunSummary], names: Sequence[str]) -> list[str]:
    """The keys in which configurations differ, with their values; names where they are many."""
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.config)
            if has_effect(key) and key not in _SEEDS
            and len({str(run.config.get(key)) for run in runs}) > 1]  # fmt: skip
    if not 0 < len(keys) <= _MOST_KEYS:
        return list(names)
    return [", ".join(f"{key}={run.config.get(key, 'absent')}" for key in keys) for run in runs]


def ranking_lines(ranking: Ranking) -> list[str]:
    """The ranking for a console: one line a configuration."""
    warned = f" (val_loss does not compare: {ranking.unlike})" if ranking.unlike else ""
    lines = [f"ranking by {ranking.measure}{warned}:"]
    for number, groups in enumerate(ranking.by_text):
        lines += [f"{OTHER_TEXT}:"] if number else []
        for place, group in enumerate(groups, start=1):
            states = sorted({run.state for run in group.runs})
            count = f"{group.count}, " if len(group.runs) > 1 else ""
            told = f"{group.shown(ranking.measure)} [{count}{', '.join(states)}]"
            lines.append(f"{place:3}. {told}  {group.label}")
    return lines
