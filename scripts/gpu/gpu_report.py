"""What ``bench gpu`` measured, as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_Measured = Mapping[str, Any]


def table_of(document: _Measured) -> str:
    """Ops, steps and peers as tables.

    Args:
        document: of ``scripts/gpu/gpu.py``.
    """
    about, rates = document["environment"], document["rates"]
    rows, tokens = about["tokens"]
    lines = [
        f"# {about['device']}",
        "",
        f"Made by `{' '.join(about['command'])}` on {about['date']}, torch {about['torch']}."
        f" Measured rates: {rates['bf16_tflops']:.4g} TFLOP/s in bf16,"
        f" {rates['fp32_tflops']:.4g} in fp32, {rates['bandwidth_gb']:.4g} GB/s."
        f" A microbatch is {rows} x {tokens:,} tokens.",
        "",
        *_table(_ops(document["ops"])),
        "",
        *_table(_steps(document["steps"])),
        "",
        *_table(_peers(document["peers"])),
        "",
    ]
    return "\n".join(lines)


def _ops(ops: Sequence[_Measured]) -> Iterator[Sequence[str]]:
    yield (
        "op", "kernels", "forward, us", "of roofline", "plain / ours", "with backward, us",
        "of roofline", "plain / ours",
    )  # fmt: skip
    for op in ops:
        cells = [op["op"], op["kernels"]]
        for key in ("forward_seconds", "with_backward_seconds"):
            ours, plain, bound = (op[name][key] for name in ("ours", "plain", "roofline"))
            cells += [f"{ours * 1e6:,.1f}", f"{bound / ours:.0%}", f"{plain / ours:.2f}"]
        yield cells


def _steps(steps: Mapping[str, _Measured]) -> Iterator[Sequence[str]]:
    yield (
        "training step", "tokens/s", "MFU", "launches", "synchronisations", "peak GB",
        "predicted GB",
    )  # fmt: skip
    for name, found in steps.items():
        if "failed" in found:
            yield (name, found["failed"], *[""] * 5)
            continue
        counts = (found["launches"], found["synchronisations"])
        yield (
            name, f"{found['tokens_per_second']:,.0f}", f"{found['mfu']:.1%}",
            *("not counted" if n is None else f"{n:,}" for n in counts),
            f"{found['peak_memory_bytes'] / 1e9:.2f}", f"{found['predicted_bytes'] / 1e9:.2f}",
        )  # fmt: skip


def _peers(peers: Mapping[str, Mapping[str, _Measured]]) -> Iterator[Sequence[str]]:
    yield "forward and backward", "who", "tokens/s", "peak GB", "ours / theirs"
    for name, by_name in peers.items():
        ours = by_name.get("ours_lm", {}).get("tokens_per_second")
        for who, found in by_name.items():
            if "failed" in found:
                yield name, who, found["failed"], "", ""
                continue
            rate = found["tokens_per_second"]
            ratio = f"{ours / rate:.2f}" if ours else ""
            yield name, who, f"{rate:,.0f}", f"{found['peak_bytes'] / 1e9:.2f}", ratio


def _table(rows: Iterator[Sequence[str]]) -> list[str]:
    head, *rest = list(rows)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest)]
