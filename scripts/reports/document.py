"""A small document of headings, text, tables and figures, as Markdown and as one HTML file.

The HTML holds its figures inside; Markdown refers to PNG files beside it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from scripts.cli.outputs import check_output
from train.exchange.output_files import make_folder, write_bytes

_RENDERER = MarkdownIt("js-default", {"breaks": True})  # tags in a text are text
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 .2rem; overflow-wrap: anywhere; }
.lead { font-size: 1.15rem; font-weight: 600; border-left: 4px solid #36c; padding-left: .8rem; }
"""
# In a narrow window cells wrap and pictures shrink; a table that is wider still scrolls by itself,
# with a shadow at the end that is hidden.
_NARROW = """
table { display: block; overflow-x: auto; background:
  linear-gradient(90deg, #fff 50%, #fff0) left / 2rem 100% no-repeat local,
  linear-gradient(270deg, #fff 50%, #fff0) right / 2rem 100% no-repeat local,
  linear-gradient(90deg, #0003, #0000) left / .7rem 100% no-repeat scroll,
  linear-gradient(270deg, #0003, #0000) right / .7rem 100% no-repeat scroll; }
td, td code { white-space: nowrap; }
@media (max-width: 40rem) {
  table { font-size: .85rem; } th, td { padding: .25rem .4rem; vertical-align: top; }
  td, td code { white-space: normal; overflow-wrap: normal; } }
"""
HTML_SUFFIX = ".html"
MARKDOWN, HTML = "report.md", f"report{HTML_SUFFIX}"
_ESCAPED = "backslashreplace"  # a damaged receipt may hold what has no UTF-8 form


@dataclass(frozen=True)
class Table:
    """Rows under a head, all text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure with its name and what it shows."""

    name: str
    caption: str
    figure: Figure


ReportPart = str | Table | Picture


@dataclass
class ReportDocument:
    """What a report says, in order.

    Attributes:
        title: the heading.
        lead: the answer, in one line.
        sections: heading -> blocks.
    """

    title: str
    lead: str
    sections: dict[str, list[ReportPart]] = field(default_factory=dict)

    def add(self, heading: str, *blocks: ReportPart | None) -> None:
        """Append blocks to a section; None is left out."""
        self.sections.setdefault(heading, []).extend(b for b in blocks if b is not None)

    def write(self, folder: Path) -> Path:
        """Write ``report.md``, its PNG files and ``report.html``; returns the Markdown's path.

        Raises:
            UserError: the folder cannot be written.
        """
        make_folder(folder)
        images = self._images()
        for name, image in images.items():
            write_bytes(folder / f"{name}.png", image)
        write_bytes(folder / MARKDOWN, self.markdown().encode(errors=_ESCAPED))
        write_bytes(folder / HTML, self.html(images).encode(errors=_ESCAPED))
        return folder / MARKDOWN

    def page(self, path: Path) -> Path:
        """Write one HTML file alone; returns its path.

        Raises:
            UserError: it cannot be written.
        """
        make_folder(path.parent)
        write_bytes(path, self.html(self._images()).encode(errors=_ESCAPED))
        return path

    def _images(self) -> dict[str, bytes]:
        """PNG of each picture, by name."""
        blocks = (block for blocks in self.sections.values() for block in blocks)
        return {block.name: _png(block.figure) for block in blocks if isinstance(block, Picture)}

    def markdown(self) -> str:
        """As Markdown."""
        parts = [f"# {self.title}", f"**{self.lead}**"]
        for heading, blocks in self.sections.items():
            parts += [f"## {heading}", *(_markdown(block) for block in blocks)]
        return "\n\n".join(parts) + "\n"

    def html(self, images: dict[str, bytes]) -> str:
        """The Markdown as one HTML page, its pictures inside.

        Args:
            images: PNG of each picture, by name.
        """
        body = _RENDERER.render(self.markdown()).replace("<p>", '<p class="lead">', 1)
        for name, data in images.items():
            encoded = base64.b64encode(data).decode()
            body = body.replace(f'src="{name}.png"', f'src="data:image/png;base64,{encoded}"')
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head += f"<style>{_NARROW}</style>"
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def check_report(folder: Path) -> None:
    """Refuse to write a report over files that are none.

    Raises:
        UserError: names the file.
    """
    check_output("report", folder / HTML, _STYLE)
    if not (folder / HTML).exists():
        check_output("report", folder / MARKDOWN, "**\n\n## ")


def check_page(path: Path) -> None:
    """Refuse to write a report's HTML file over one that is none, or where it cannot be written.

    Raises:
        UserError: names the file.
    """
    check_output("report", path, _STYLE)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    return buffer.getvalue()


def _markdown(block: ReportPart) -> str:
    if isinstance(block, str):
        return block
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.name}.png)\n\n{block.caption}"
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)
