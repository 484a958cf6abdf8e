"""What a rank tells the launcher that started it, so that the user reads it last.

torchrun ends its output with a frame of its own about the rank that failed. Of our lines the frame
shows those in the error file that it names to each rank; below the frame a small process writes
them once more, which waits until the launcher has left. Nothing of torchrun is changed: its frame
and its exit code 1 stand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from parallel.launch import is_launched

_REPEAT = """
import os, select, sys
text = sys.stdin.read()
try:
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [])
except ProcessLookupError:
    pass
sys.stderr.write(text)
"""


def tell_launcher(text: str) -> None:
    """Have the launcher's output end with ``text``; nothing where no launcher started this.

    Args:
        text: whole lines, as they were printed.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            inner = {"message": text.rstrip(), "extraInfo": {"timestamp": str(int(time.time()))}}
            content = json.dumps({"message": inner}, allow_nan=False)
            Path(path).write_text(content, encoding="utf-8")
    if is_launched() and _last_attempt() and sys.platform == "linux":
        with suppress(OSError):
            _repeat_below(text)


def _last_attempt() -> bool:
    """Whether torchrun will not start the ranks again, which would say the same once more."""
    number, most = (os.environ.get(f"TORCHELASTIC_{n}") for n in ("RESTART_COUNT", "MAX_RESTARTS"))
    return number == most


def _repeat_below(text: str) -> None:
    """Start the process that writes ``text`` when our parent has left; signals to us spare it."""
    into, out = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, into, 0),
               (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]  # fmt: skip
    words = [sys.executable, "-ISc", _REPEAT, str(os.getppid())]
    os.posix_spawn(sys.executable, words, os.environ, file_actions=actions, setsid=True)
    os.close(into)
    os.write(out, text.encode())
    os.close(out)
