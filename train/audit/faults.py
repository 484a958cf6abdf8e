"""How a fault that the audit found ends the run: on every rank, with its name."""

from __future__ import annotations

from parallel.engine import Engine
from train.audit.evidence import Check, Evidence


class AuditError(RuntimeError):
    """The run does not do what it was asked to; one line a fault, each with the check's name."""


def faults_of(checks: dict[str, Check], e: Evidence) -> list[str]:
    """Lines of all checks, each with its check's name."""
    return [f"{name}: {line}" for name, check in checks.items() for line in check(e)]


def refuse(engine: Engine, faults: list[str]) -> None:
    """Every rank raises what any has found, and names which where not all have."""
    ranks = engine.gather(faults)
    found = {
        line: [r for r, lines in enumerate(ranks) if line in lines] for f in ranks for line in f
    }
    if not found:
        return
    told = [
        line if len(holders) == len(ranks) else f"{line} (rank {', '.join(map(str, holders))})"
        for line, holders in found.items()
    ]
    shown = told[:20] + ([f"... and {len(told) - 20} more"] if len(told) > 20 else [])
    raise AuditError(
        "the run does not do what it was asked to:\n" + "\n".join(f"  {f}" for f in shown)
    )
