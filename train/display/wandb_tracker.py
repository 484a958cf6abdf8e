"""Weights & Biases, which shows every step of a run once although the run may repeat some.

W&B's history only grows: it drops a step that is not above its last one, its rewind needs a server
that offers it, and a kill loses what its process had not written yet. So
``metrics.jsonl`` decides, and W&B follows it:

- A start asks how far W&B got (the server; offline the ``.wandb`` files of the run folder), sends
  the steps of ``metrics.jsonl`` that are missing there, and does not send again what the run
  repeats: a resumed run repeats it to the bit.
- A rollback repeats steps with other values. It goes on as another W&B run, ``ID-r1``, ``ID-r2``
  ..., which gets the kept steps from ``metrics.jsonl`` first; the abandoned ones stay in the old.

Offline each start leaves one folder ``wandb/offline-run-*-ID``. No step is in two of them, so
``wandb sync`` joins them in the order in which they began.
"""

from __future__ import annotations

import logging
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError, one_line

log = logging.getLogger(__name__)

_HEAD, _BLOCK = 7, 32768  # of the LevelDB log format: record header and block, in bytes
_FULL, _LAST = 1, 4  # kinds of pieces that end a record
_SETTLED = 5.0  # seconds; W&B's process outlives a killed run for a moment and may still write


class WandbTracker:
    """Sends each step once, under its own number.

    Args:
        online: whether to upload at once.
        project: the project.
        entity: team or user; empty: the account's own.
        name: of the run.
        folder: run folder.
        config: the resolved config.
        history: reads the steps that the run has done, oldest first.
        done: their number.
        saved: what :meth:`before_save` gave to the checkpoint from which the run resumes.

    Raises:
        UserError: W&B does not take it: a name, a missing key, no network.
    """

    def __init__(
        self,
        online: bool,
        project: str,
        entity: str,
        name: str,
        folder: Path,
        config: dict[str, Any],
        history: Callable[[], list[dict[str, Any]]],
        done: int = 0,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        import wandb  # noqa: PLC0415  a second to import, and most runs never use it
        from wandb.errors import Error  # noqa: PLC0415

        self._refusal = Error
        self._asked = f"wandb.mode={'online' if online else 'offline'} wandb.project={project}"
        self._online, self._folder, self._name = online, folder, name
        self._history, self._remembered = history, folder / "wandb_id.txt"
        self._init = lambda run_id, name: wandb.init(
            mode="online" if online else "offline",
            project=project,
            entity=entity or None,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
        )
        remembered = self._remembered_id()[0]
        # The checkpoint's is the one that holds its steps: a rollback behind it began another.
        known = (saved or {}).get("id") or remembered
        self._open(known, done if known else 0)

    def show(self, record: Mapping[str, Any]) -> None:
        """Log one step, unless W&B has it."""
        step = record["step"]
        if step > self._held:
            values = {name: value for name, value in record.items() if value is not None}
            self._run.log(values, step=step, commit=True)
            self._held = step

    def rewind(self, step: int) -> None:
        """Go on as another W&B run that begins with the steps up to ``step``."""
        first, _, number = self._run.id.partition("-r")
        self._run.finish()
        self._open(f"{first}-r{int(number or 0) + 1}", 0)
        log.warning("W&B run %s goes on behind step %d as %s", first, step, self._run.id)

    def before_save(self) -> dict[str, Any]:
        """The id, by which a resumed run finds its W&B run."""
        return {"wandb": {"id": self._run.id}}

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()

    def _open(self, run_id: str | None, elsewhere: int) -> None:
        """Begin or continue a W&B run, and send what it lacks.

        Args:
            run_id: of the W&B run; None: a new one.
            elsewhere: last step that it holds if nothing here tells: its files may have been
                uploaded and removed, or lie in the folder that the checkpoint was copied from.
        """
        found = self._last_step(run_id) if run_id else None
        before = [step for known, step in [self._remembered_id()] if known == run_id]
        name, _, number = (run_id or "").partition("-r")
        try:
            self._run = self._init(run_id, self._name + (f"-r{number}" if number else ""))
        except self._refusal as error:
            raise UserError(f"{self._asked}: Weights & Biases says: {one_line(error)}") from error
        if self._online:
            self._held = max(0, self._run.starting_step - 1)
        else:
            self._held = elsewhere if found is None else max([found, *before])
        self._remembered.write_text(f"{self._run.id} {self._held}\n", encoding="utf-8")
        for record in self._history():
            self.show(record)

    def _last_step(self, run_id: str) -> int | None:
        for file in wandb_files(self._folder, run_id):
            time.sleep(min(_SETTLED, max(0.0, file.stat().st_mtime + _SETTLED - time.time())))
        return last_step(self._folder, run_id)

    def _remembered_id(self) -> tuple[str | None, int]:
        """The id in ``wandb_id.txt``, and the last step that was held before its newest start."""
        if not self._remembered.exists():
            return None, 0
        words = self._remembered.read_text(encoding="utf-8").split()
        return (words[0] if words else None), int(words[1]) if len(words) > 1 else 0


def wandb_files(folder: Path, run_id: str) -> list[Path]:
    """What W&B left of a run in a run folder, in the order in which it was begun."""
    return sorted((folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"))


def last_step(folder: Path, run_id: str) -> int | None:
    """The last step in these files; None if there is no file."""
    files = wandb_files(folder, run_id)
    return max((max(logged_steps(file), default=0) for file in files), default=None)


def logged_steps(file: Path) -> Iterator[int]:
    """Steps in a ``.wandb`` file, in the order in which they were logged."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415  see above

    record_type: Any = vars(wandb_internal_pb2)["Record"]
    for data in _records(file.read_bytes()):
        record = record_type.FromString(data)
        if record.HasField("history"):
            yield record.history.step.num


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log behind W&B's header of 7 bytes; a kill may have cut the last one."""
    at, record = 7, b""
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + _HEAD : at + _HEAD + length]
        if len(piece) < length or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return
        at += _HEAD + length
        record += piece
        if kind in (_FULL, _LAST):
            yield record
            record = b""
