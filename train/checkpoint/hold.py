"""Who reads a checkpoint holds it: nobody removes or renames it meanwhile.

A hold is a shared lock on the checkpoint's manifest. Who moves a folder takes that lock alone, and
leaves a folder that is held where it is. Locks end with their process. Where a file system has
none, or does not carry them between hosts, a folder may vanish: the reader takes the next newest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.checkpoint import file_lock
from train.checkpoint.files import MANIFEST, DamagedCheckpointError
from train.errors import one_line

_NEVER_WAIT = os.O_NONBLOCK  # whatever stands there under the manifest's name


class Hold:
    """A checkpoint that stays while this is not closed; also a context.

    Args:
        folder: the checkpoint.

    Attributes:
        folder: the checkpoint.

    Raises:
        DamagedCheckpointError: it has no manifest, or is being removed.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = -1
        self.folder = folder
        try:
            self._descriptor = os.open(folder / MANIFEST, os.O_RDONLY | _NEVER_WAIT)
            found = file_lock.take(self._descriptor, shared=True)
            gone = not os.path.samestat(os.fstat(self._descriptor), os.stat(folder / MANIFEST))
        except FileNotFoundError as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder}: file {MANIFEST} is missing"
            ) from error
        except OSError as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder} cannot be read: {one_line(error)}"
            ) from error
        if gone or found is False:
            self.close()
            raise DamagedCheckpointError(f"checkpoint {folder} is just being removed")

    def close(self) -> None:
        """Let go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@contextmanager
def unheld(folder: Path) -> Iterator[bool]:
    """Whether nobody holds ``folder``; nobody begins to while this is entered."""
    descriptor = _open_manifest(folder)
    if descriptor is None:  # damaged: nobody can hold it
        yield True
        return
    try:
        yield file_lock.take(descriptor) is not False
    finally:
        os.close(descriptor)


def _open_manifest(folder: Path) -> int | None:
    for mode in (os.O_RDWR, os.O_RDONLY):  # some file systems lock only what is open for writing
        try:
            return os.open(folder / MANIFEST, mode | _NEVER_WAIT)
        except OSError:
            continue
    return None
