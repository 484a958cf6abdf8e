"""Write the table of ``docs/studies/default_run/README.md`` from the trials beside it.

python docs/studies/default_run/table.py             the table anew, from trials.json
python docs/studies/default_run/table.py RUN ...     first take these run folders into trials.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRIALS, DOCUMENT = HERE / "trials.json", HERE / "README.md"
HEAD = (
    "| trial | steps seen | load last above 2 at | load, last 20 steps | val_loss | bits per byte |"
)
_TWICE = 2.0


def trial_of(folder: Path) -> dict[str, Any]:
    """What is kept of a run: its config without paths, code, curves, results.

    Args:
        folder: of the run, finished or not.
    """
    import yaml  # noqa: PLC0415  only here

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for section, key in ((config, "run_dir"), (config["data"], "cache_dir")):
        section.pop(key)
    receipt = folder / "receipt.json"
    final = json.loads(receipt.read_text()).get("validation", {}) if receipt.exists() else {}
    identity = json.loads((folder / "identity.json").read_text())
    return {
        "config": config,
        "source_sha256": identity["code"]["source_sha256"],
        "loss": [round(line["loss"], 4) for line in lines],
        "expert_load_max": [round(line["expert_load_max"], 3) for line in lines],
        "validation": final,
    }


def table(trials: dict[str, dict[str, Any]]) -> str:
    """One line a trial."""
    rows = [HEAD, "|" + " --- |" * (HEAD.count("|") - 1)]
    for name, trial in trials.items():
        loads, final = trial["expert_load_max"], trial["validation"]
        uneven = [step for step, load in enumerate(loads, start=1) if load > _TWICE]
        late = f"{sum(loads[-20:]) / len(loads[-20:]):.2f}"
        asked = f"{len(loads)} of {trial['config']['train']['steps']}"
        loss = (
            f"{final['loss']:.4f} | {final['bits_per_byte']:.4f}"
            if final
            else "not run to | the end"
        )
        rows.append(f"| {name} | {asked} | {max(uneven, default=0)} | {late} | {loss} |")
    return "\n".join(rows) + "\n"


def main(folders: list[str]) -> None:
    """Take runs, and write the table between the document's text."""
    trials = json.loads(TRIALS.read_text()) if TRIALS.exists() else {}
    trials |= {Path(folder).name: trial_of(Path(folder)) for folder in folders}
    TRIALS.write_text(json.dumps(trials, separators=(",", ":")) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(HEAD)
    after = rest.partition("\n\n")[2]
    DOCUMENT.write_text(f"{before}{table(trials)}\n{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
