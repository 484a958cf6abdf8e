"""Many lives: in several processes, over several calls, with a record of each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.endurance import commands, life
from tests.endurance.broken import BrokenError
from tests.endurance.machine import Living
from tests.endurance.references import References
from train.record.receipt import source_hash

Record = dict[str, Any]


def say(text: str) -> None:
    """Tell the user."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Session:
    """The folder of results, and the warm parent of all starts.

    Args:
        out: the folder.
        ranks: on how many most starts run.
        plant: name of the fault that is put back; empty: none.
        faults: the same, to be called.
    """

    def __init__(
        self, out: Path, ranks: int, plant: str, faults: Sequence[Callable[[], None]]
    ) -> None:
        self._ranks, self._plant = ranks, plant
        self._code = _code_hash()
        self._out = out.absolute() / (f"ranks_{ranks}" + (f"_{plant}" if plant else ""))
        self._out.mkdir(parents=True, exist_ok=True)
        self._shared = out.absolute() / f"shared_{self._code[:12]}"
        self._commands = commands.prepare(self._shared, faults)

    def many(self, seeds: Iterable[int], workers: int, stop: bool) -> int:
        """Live those that were not yet; the number of broken ones among all."""
        asked = list(seeds)
        todo = [seed for seed in asked if self._done(seed) is None]
        if len(todo) < len(asked):
            say(f"{len(asked) - len(todo)} lives were lived before")
        began = time.monotonic()
        pids = [self._work(todo[number::workers], stop) for number in range(workers)]
        for pid in pids:
            os.waitpid(pid, 0)
        records = [record for seed in asked if (record := self._done(seed)) is not None]
        broken = self._summarise(records, time.monotonic() - began)
        missing = set(asked) - {record["seed"] for record in records}
        if missing and not stop:
            say(f"without a record, since their worker died: {sorted(missing)}")
        return broken + (0 if stop else len(missing))

    def one(self, seed: int, simplify: bool) -> int:
        """Live one life, and keep its folder; 1 if it broke."""
        story = life.draw(seed, self._ranks)
        record = self._live(story, "one")
        say(json.dumps(record["life"], indent=1))
        self._tell(record)
        if simplify and record["broken"]:
            self._simplify(record)
        return int(record["broken"] is not None)

    def _simplify(self, record: Record) -> None:
        """Drop one thing after the other for as long as it breaks."""
        going_on = True
        while going_on:
            going_on = False
            for story in life.simpler(life.Life.from_json(record["life"])):
                other = self._live(story, "simpler")
                if other["broken"]:
                    record, going_on = other, True
                    say(f"simpler: {len(story.starts)} starts: {other['broken']}")
                    break
        say(json.dumps(record["life"], indent=1))
        say(record["broken"])

    # ---- one life ----------------------------------------------------------------------------
    def _work(self, seeds: Sequence[int], stop: bool) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            for seed in seeds:
                record = self._live(life.draw(seed, self._ranks), f"life_{seed:06d}")
                self._path(seed).write_text(json.dumps(record))
                self._tell(record)
                if stop and record["broken"]:
                    break
        except BaseException:  # its lives that have no record count as broken
            traceback.print_exc()
        finally:
            os._exit(0)

    def _live(self, story: life.Life, name: str) -> Record:
        place = self._out / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        references = References(self._commands, self._shared / "references", place / "references")
        living, broken, printed = Living(story, self._commands, references, place), None, ""
        began = time.monotonic()
        try:
            living.run()
        except BrokenError as error:
            broken, printed = error.what, error.printed
        except Exception as error:  # a fault of the test itself must not pass for a life that held
            broken = f"the test itself failed: {type(error).__name__}: {error}"
            printed = traceback.format_exc()
        finally:
            living.end()
        record = {
            "seed": story.seed, "ranks": self._ranks, "code_sha256": self._code,
            "broken": broken, "starts": living.starts, "counts": dict(living.counts),
            "seconds": round(time.monotonic() - began, 1), "life": story.as_json(),
        }  # fmt: skip
        if broken is None and name != "one":
            shutil.rmtree(place)
        else:
            (place / "life.json").write_text(json.dumps(record, indent=1))
            (place / "printed.txt").write_text(printed)
        return record

    # ---- records -----------------------------------------------------------------------------
    def _path(self, seed: int) -> Path:
        return self._out / f"life_{seed:06d}.json"

    def _done(self, seed: int) -> Record | None:
        """Its record, if it was lived with this code."""
        path = self._path(seed)
        record = json.loads(path.read_text()) if path.exists() else None
        return record if record and record.get("code_sha256") == self._code else None

    def _tell(self, record: Record) -> None:
        told = f"life {record['seed']}: {record['starts']} starts, {record['seconds']} s"
        if record["broken"]:
            plant = f" --plant {self._plant}" if self._plant else ""
            told += (
                f"\n  BROKEN at start {record['starts']}: {record['broken']}\n  again: python"
                f" -m tests.endurance --ranks {self._ranks} --seed {record['seed']}{plant}"
                f" --out DIR"
            )
        say(told)

    def _summarise(self, records: Sequence[Record], seconds: float) -> int:
        counts: Counter[str] = Counter()
        for record in records:
            counts.update(record["counts"])
        broken = [record for record in records if record["broken"]]
        summary = {
            "ranks": self._ranks,
            "planted": self._plant or None,
            "code_sha256": self._code,
            "lives": len(records),
            "starts": sum(record["starts"] for record in records),
            "seconds": sum(record["seconds"] for record in records),
            "events": {name: counts[name] for name in life.EVENTS},
            "broken": {record["seed"]: record["broken"] for record in broken},
        }
        (self._out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        say(json.dumps(summary, indent=1))
        say(f"{len(broken)} of {len(records)} lives broken, {seconds:.0f} s")
        return len(broken)


def _code_hash() -> str:
    """Of what a life depends on."""
    digest = hashlib.sha256(source_hash().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
