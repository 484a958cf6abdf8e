"""``params.csv``: what happens to each parameter, by the tables that the code itself acts on."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from model.precision import precision_of
from optim.groups import ParamRecord
from quant.apply import QuantRecord, describe
from train.config.schema import TrainConfig

COLUMNS = (
    "name", "shape", "owner", "split", "weight_decay", "storage", "compute", "reduce", "quantised",
)  # fmt: skip


TableRow = list[str | float]


def table_rows(
    records: Iterable[ParamRecord], train: TrainConfig, quantised: Iterable[QuantRecord]
) -> list[TableRow]:
    """One row a parameter that lives here.

    Args:
        records: the optimizer's table.
        train: its two precisions.
        quantised: seams that quantisation replaced.
    """
    formats = {record.parameter: describe(record) for record in quantised if record.parameter}
    rows: list[TableRow] = []
    for r in records:
        dtypes = precision_of(r.name, train.precision.value, train.head_precision.value)
        rows.append(
            [
                r.name,
                "x".join(str(n) for n in r.shape),
                r.owner.value,
                r.split,
                r.weight_decay,
                *(
                    str(dtype).removeprefix("torch.")
                    for dtype in (dtypes.storage, dtypes.compute, dtypes.reduce)
                ),
                formats.get(r.name, "no"),
            ]
        )
    return rows


def write_params_table(path: Path, ranks: Iterable[list[TableRow]], order: Iterable[str]) -> None:
    """Write the rows of all ranks, each parameter once, in the order of the network.

    Args:
        path: CSV to write.
        ranks: rows of every rank.
        order: names of the whole model's parameters.
    """
    rows = {str(row[0]): row for some in ranks for row in some}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows[name] for name in order)
