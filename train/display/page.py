"""``report.html``: a run at a glance in a browser, while it trains and afterwards.

The page needs no other file and reloads itself until the run has ended. It is written with
``loss.png`` at every evaluation, and at least every few minutes.
"""

from __future__ import annotations

import base64
import datetime
import html
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.checkpoint.files import replace_durably
from train.display.health import Health
from train.record.metrics import METRICS, Record, metric_of, read_metrics
from train.record.plots import draw_losses
from train.record.report import CURVE, TEXT
from train.run_folder.folder import METRICS as METRICS_FILE

PAGE = "report.html"
_RELOAD = 10  # seconds
_OLDEST = 120.0  # seconds that a page of a running run may be old, evaluations or not
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto;
  padding: 0 1rem; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .7rem; }
.state { font-size: 1.15rem; font-weight: 600; }
.warning { border-left: 4px solid #d1495b; padding-left: .7rem; }
.halves { display: none; }
@media (max-width: 40rem) {
  .whole { display: none; } .halves { display: block; }
  .halves div { aspect-ratio: 5.5 / 6.55; background: left bottom / 200% auto no-repeat; }
  .halves div.right { background-position: right bottom; }
  table, tbody { display: block; } tr { display: grid; grid-template-columns: 1fr auto;
    border-bottom: 1px solid #ddd; } tr:first-child { display: none; }
  td { border: 0; } td:nth-child(n+3) { grid-column: 1 / -1; font-size: .85rem; color: #555; }
  td:nth-child(4):not(:empty)::before { content: "healthy: "; } }
"""


class Page:
    """A tracker that writes the page.

    Args:
        folder: of the run.
        title: what the run is.
        steps: of the whole run.
        health: has told what is wrong.
    """

    def __init__(self, folder: Path, title: str, steps: int, health: Health) -> None:
        self._folder, self._title, self._steps, self._health = folder, title, steps, health
        self._written = time.monotonic()

    def show(self, record: Mapping[str, Any]) -> None:
        """Write curve and page where there is something new; at the last step the end does."""
        old = time.monotonic() - self._written > _OLDEST
        if record["step"] < self._steps and ("val_loss" in record or old):
            records = read_metrics(self._folder / METRICS_FILE)
            draw_losses(records, self._folder / CURVE, self._title)
            self._write(records, ended=False)

    def rewind(self, step: int) -> None:
        """The next page has forgotten the steps."""

    def before_save(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def close(self) -> None:
        """The last page, from the curve that the run leaves; it does not reload itself."""
        if (self._folder / CURVE).exists():
            self._write(read_metrics(self._folder / METRICS_FILE), ended=True)

    def _write(self, records: list[Record], ended: bool) -> None:
        text = self._folder / TEXT
        sample = text.read_text(encoding="utf-8", errors="replace") if text.exists() else ""
        curve = (self._folder / CURVE).read_bytes()
        page = page_html(
            self._title, records, self._steps, self._health.warnings, sample, curve, ended
        )
        replace_durably(self._folder / PAGE, page)
        self._written = time.monotonic()


def page_html(
    title: str,
    records: list[Record],
    steps: int,
    warnings: list[tuple[int, str]],
    sample: str,
    curve: bytes,
    ended: bool,
) -> str:
    """The page as text.

    Args:
        title: what the run is.
        records: its steps so far.
        steps: of the whole run.
        warnings: step and text of each.
        sample: text that the model wrote last.
        curve: PNG of its losses.
        ended: whether it trains no more.
    """
    head = [f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>']
    head += ['<meta name="viewport" content="width=device-width, initial-scale=1">']
    if not ended:
        head.append(f'<meta http-equiv="refresh" content="{_RELOAD}">')
    image = base64.b64encode(curve).decode()
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="state">{_state(records, steps, ended)}</p>',
    ]
    body += [f'<p class="warning">Step {at}: {html.escape(text)}</p>' for at, text in warnings]
    source = f"data:image/png;base64,{image}"
    body.append(f'<div class="whole"><img alt="losses" src="{source}"></div>')
    # In a narrow window the left panels stand above the right ones, without the figure's title.
    head.append(f"<style>.halves div {{ background-image: url('{source}'); }}</style>")
    body.append('<div class="halves"><div></div><div class="right"></div></div>')
    if sample:
        body.append(f"<h2>What it writes</h2><pre>{html.escape(sample)}</pre>")
    body.append(f'<h2>Metrics</h2><div class="wide">{_metrics(records)}</div>')
    return (
        f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _state(records: list[Record], steps: int, ended: bool) -> str:
    step = records[-1]["step"] if records else 0
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if ended:
        word = "Finished" if step >= steps else "Stopped"
        return f"{word} after step {step:,} of {steps:,}, {now}"
    return f"Step {step:,} of {steps:,}, {now}; this page reloads itself"


def _metrics(records: list[Record]) -> str:
    """The newest value of each metric, in the order of the table."""
    newest: Record = {}
    for record in records:
        newest |= record
    order = {metric.name: place for place, metric in enumerate(METRICS)}
    names = sorted(newest, key=lambda name: order[metric_of(name).name])
    rows = [
        f"<tr><td><code>{html.escape(name)}</code></td>"
        f'<td class="n">{html.escape(_shown(newest[name]))}</td>'
        f"<td>{html.escape(metric_of(name).unit)}</td>"
        f"<td>{html.escape(metric_of(name).healthy)}</td></tr>"
        for name in names
    ]
    head = "<tr><th>metric</th><th>newest</th><th>what it is, unit</th><th>healthy</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _shown(value: Any) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
