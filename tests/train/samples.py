"""Reading ``samples.jsonl`` back: is every token of a pass through the data there once?"""

import json
from collections import defaultdict
from pathlib import Path

from data.global_batch import Sample


def read_samples(folder: Path) -> list[dict]:
    """Lines of a run."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def every_token_once(folder: Path, epochs: int) -> None:
    """Each of the first passes holds all training tokens; their number is the receipt's.

    Pieces of a document that follow each other without gap or overlap, from 0 on, and whose lengths
    add up to the tokens of the store, hold every token of every document once.
    """
    lines = read_samples(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    pieces = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for source, document, epoch, start, stop in (p for row in line["rows"] for p in row):
            sample = Sample(source, document, epoch, start, stop)
            pieces[sample.source, epoch][sample.document].append((sample.start, sample.stop))
    receipt = json.loads((folder / "receipt.json").read_text())
    for source, about in receipt["data"]["sources"].items():
        for epoch in range(epochs):
            found = pieces[source, epoch]
            assert len(found) == about["documents"]
            for document, spans in found.items():
                ends = [0] + [stop for _, stop in sorted(spans)]
                assert [start for start, _ in sorted(spans)] == ends[:-1], (document, spans)
            tokens = sum(b - a for spans in found.values() for a, b in spans)
            assert tokens == about["tokens"]
