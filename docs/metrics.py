"""Write ``docs/metrics.md`` from the one table of metrics.

python docs/metrics.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file
    sys.path[0] = str(ROOT)

from train.record.metrics import describe  # noqa: E402

DOCUMENT = ROOT / "docs" / "metrics.md"
HEAD = """# Metrics

Every field of a run's `metrics.jsonl`, one line of JSON a step; `report.html`, TensorBoard and W&B
show the same. Fields marked * depend on machine and moment, all others are equal between equal
runs. Where a name ends in `*`, the name of a source or a part of `quant` follows. A run warns of
the worst signs by itself, once until they are gone: gates that collapse, experts without tokens, a
validation loss that rises, gradients and streams that explode (`train/display/health.py`). The
ranges are rules of thumb from small runs. Made by `python docs/metrics.py` from the table in
`train/record/metrics.py`.

"""


def document() -> str:
    """The whole file."""
    return f"{HEAD}{describe()}\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
