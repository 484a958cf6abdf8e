"""The report of a study."""

from pathlib import Path

from scripts.study_protocol import Protocol


def write_study_report(name: str, protocol: Protocol, root: Path) -> Path:
    """Write it."""
    path = root / name / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {name} {len(protocol.store.runs)}\n")
    return path
