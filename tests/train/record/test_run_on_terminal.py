"""A real run on a real terminal, once: what it shows while it trains, and what lies beside it.

The classes behind it have tests of their own; here is held that a run uses them. The process is
forked from one with a run's imports, and every step counts as a slow one.
"""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from tests.helpers import warm_context
from tests.parallel.torchrun import SMALL_MODEL
from tests.train.record.terminal import screen

COLUMNS, STEPS, SECONDS = 60, 6, 280
SMALL = f"""
{" ".join(SMALL_MODEL)} train.device=cpu train.steps={STEPS} train.seq_len=32
train.global_batch_tokens=128 train.micro_batch_size=2 train.eval_every=2 train.eval_tokens=128
train.async_checkpoint=false
sample.tokens=2 data.tokenizer=byte optim.schedule.warmup_steps=0 data.sources.text.kind=jsonl
""".split()


def child(terminal, words, folder, environment):
    """The command ``v4 pretrain``; notes at each step what lies in the run's folder."""
    os.setsid()
    os.environ.clear()  # that of the process it is forked from is the first test's
    os.environ.update(environment)
    screen_of_ours = os.open(terminal, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(screen_of_ours, descriptor)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
    from train import pretrain  # noqa: PLC0415  of the forked process
    from train.display import console  # noqa: PLC0415

    console.SLOW = 0.0
    show = console.Console.show

    def noted(self, record):
        show(self, record)
        there = [name for name in ("loss.png", "report.html") if (folder / "run" / name).is_file()]
        with (folder / "seen").open("a") as file:
            file.write(json.dumps([record["step"], there]) + "\n")

    console.Console.show = noted
    os.environ["OMP_NUM_THREADS"] = "1"
    code = pretrain.command(words)
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the run wrote to its terminal, and its folder."""
    folder = tmp_path_factory.mktemp("terminal")
    lines = (json.dumps({"text": f"{n} bottles of beer on the wall, " * 9}) for n in range(60))
    (folder / "text.jsonl").write_text("\n".join(lines))
    words = [*SMALL, f"data.sources.text.path={folder}/text.jsonl", f"run_dir={folder}/run",
             f"data.cache_dir={folder}/cache"]  # fmt: skip
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    given = (os.ttyname(theirs), words, folder, dict(os.environ))
    process = warm_context().Process(target=child, args=given, daemon=True)
    process.start()
    parts = []
    os.set_blocking(ours, False)
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            alive = process.is_alive()
            try:
                parts.append(os.read(ours, 65536))
            except BlockingIOError:
                if not alive:
                    break
                process.join(0.05)
    finally:
        process.kill()
        process.join()
    os.close(theirs)
    os.close(ours)
    written = b"".join(parts).decode()
    assert process.exitcode == 0, written[-3000:]
    return written, folder


def test_a_run_tells_of_its_microbatches_and_of_its_time(shown):
    written, _ = shown
    rows = [row for row, _ in screen(written, COLUMNS)]
    (expected,) = [n for n, row in enumerate(rows) if row.startswith("expected: ")]
    assert f"for the {STEPS - 3} steps left" in " ".join(rows[expected : expected + 2])
    steps = {int(n): at for at, row in enumerate(rows) for n in re.findall(r"^step (\d+)/", row)}
    assert steps[3] < expected < steps[4] if 4 in steps else steps[2] < expected
    told = re.findall(r"step (\d+): microbatch (\d) of 2", written)
    assert set(told) == {(str(step), n) for step in range(1, STEPS + 1) for n in "12"}


def test_no_row_of_a_run_is_torn_by_a_narrow_terminal(shown):
    written, folder = shown
    rows = screen(written, COLUMNS)
    torn = [row for row, over in rows if over and str(folder) not in row]
    assert torn == [], "only a path is longer than the terminal"
    assert any(row.startswith("  ") for row, _ in rows), "a sentence goes on in the next row"
    assert any(re.match(rf"{STEPS}/{STEPS} \|.*\| .*loss", row) for row, _ in rows), "the bar stays"


def test_picture_and_page_are_there_while_a_run_trains(shown):
    _, folder = shown
    seen = dict(map(json.loads, (folder / "seen").read_text().splitlines()))
    assert list(seen) == list(range(1, STEPS + 1))
    assert seen[1] == []
    assert seen[3] == ["loss.png", "report.html"]
