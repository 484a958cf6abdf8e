"""What the audit asks of a model before its first step: owners, shards, tables, isolation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.distributed.tensor import DTensor

from data.batch import IGNORE, Batch
from model.config import ModelConfig
from model.loss import Objective
from model.parameter_counts import parameter_shapes
from model.transformer import DeepSeekV4
from optim.groups import ParamRecord
from parallel.collectives import local
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.engine import Engine
from train.config.schema import RunConfig
from train.step import StepPlan

_NEXT_TO_NOTHING = 1e-30  # weight of a side loss that is to be formed and not to matter


def owners(engine: Engine, records: Mapping[str, ParamRecord]) -> list[str]:
    """Every parameter stands in the optimizer's table once, under the owner asked for."""
    table = Counter(record.name for record in engine.optimizer.table)
    owner_of = {record.name: record.owner for record in engine.optimizer.table}
    faults = []
    for name, record in records.items():
        if table[name] != 1:
            faults.append(f"owner: {name} stands in the optimizer's table {table[name]} times")
        elif owner_of[name] is not record.owner:
            faults.append(
                f"owner: {name} belongs to {owner_of[name].value}, {record.owner.value} was asked"
            )
    unknown = sorted(set(table) - set(records))
    return faults + [f"owner: {name} is no parameter of the model" for name in unknown]


def holders(engine: Engine, records: Iterable[str], model: ModelConfig) -> list[str]:
    """Every parameter of the model lives on exactly one pipeline stage."""
    place = engine.data_rank, engine.shard.index
    ranks = engine.gather((place, list(records)))
    held = Counter(name for where, names in ranks if where == (0, 0) for name in names)
    return [
        f"owner: {name} lives on {held[name]} pipeline stages"
        for name in parameter_shapes(model)
        if held[name] != 1
    ]


def shards(engine: Engine, run: RunConfig) -> list[str]:
    """Every parameter is in FSDP's hands, and its shards make as many copies as asked for."""
    if not engine.sharded or isinstance(engine, DeepSpeedEngine):
        return []  # what DeepSpeed reduces it checks itself, at every step
    shapes, faults = parameter_shapes(run.model), []
    here = dict(engine.model.named_parameters())
    ranks = engine.gather({name: local(p).numel() for name, p in here.items()})
    layout = run.parallel.resolve(len(ranks))
    in_ep = layout.ep // math.gcd(layout.ep, layout.shard_degree)  # replicas that share experts
    for name, parameter in here.items():
        copies = layout.dp_replicate // (in_ep if ".ffn.experts." in name else 1)
        held = sum(sizes.get(name, 0) for sizes in ranks) / math.prod(shapes[name])
        if not isinstance(parameter, DTensor):
            faults.append(f"sharding: {name} is left out: its gradient is not reduced")
        elif held != copies:
            faults.append(f"sharding: {name} is held {held:g} times, {layout} asks for {copies}")
    return faults


def hash_tables(model: DeepSeekV4) -> list[str]:
    """Faults of hash-routed layers: a constant table, or a row that names an expert twice."""
    faults = []
    for name, table_VK in model.named_buffers():
        if not name.endswith(".tid2eid"):
            continue
        config = model.config
        if config.n_routed_experts == config.num_experts_per_tok:
            continue  # there is nothing to choose
        if bool((table_VK == table_VK[0]).all()):
            faults.append(f"hash_table: {name} is constant: every token goes to the same experts")
        elif table_VK.shape[1] > 1 and bool((table_VK.sort(dim=1).values.diff(dim=1) == 0).any()):
            faults.append(f"hash_table: {name} names an expert twice for one token")
        elif len(table_VK.unique()) < min(config.n_routed_experts, table_VK.numel()):
            faults.append(f"hash_table: {name} leaves experts out")
    return faults


def isolation(engine: Engine) -> list[str]:
    """Faults of packing: the gradient of one document's loss with respect to another's embeddings.

    It must be exactly zero whatever the precision. Values would only be equal up to rounding, since
    the experts' products depend on how many rows each gets.
    """
    assert isinstance(engine.model, DeepSeekV4)
    config = engine.model.config
    cp = engine.shard.count
    length = -(-(2 * max((1, *config.ratios)) + 2) // cp) * cp
    depths = 1 + config.num_nextn_predict_layers
    objective = Objective((1.0,) * depths, 1.0, 1.0, indexer_weight=0.0, balance_weight=0.0)
    return [f"isolation: {line}" for line in _leaks(engine, 1, 2 * length, objective, 0.0)]


def isolation_of_graphs(engine: Engine, step: StepPlan) -> list[str]:
    """The same of the graphs that train (``train.compile``).

    They are asked for rows like the step's and for what its objective asks of the blocks, or they
    would be others. Side losses are of all tokens: they are weighed by so little that their
    gradient cannot pass for a leak.
    """
    assert isinstance(engine.model, DeepSeekV4)
    weights, depths = step.weights, 1 + engine.model.config.num_nextn_predict_layers
    objective = Objective(
        (1.0,) * depths, 1.0, float(weights.mtp != 0), _NEXT_TO_NOTHING * (weights.indexer != 0),
        _NEXT_TO_NOTHING * (weights.balance != 0), step.stage.indexer_phase, step.monitors,
    )  # fmt: skip
    rows, length = step.stage.micro_batch_size, step.stage.seq_len
    if length < 4:
        return []  # half a row has nothing to predict
    found = _leaks(engine, rows, length, objective, math.sqrt(_NEXT_TO_NOTHING))
    return [f"isolation: train.compile=true: by the graphs {line}" for line in found]


def _leaks(
    engine: Engine, rows: int, length: int, objective: Objective, least: float
) -> Iterator[str]:
    """Two documents a row, of which the second has labels.

    Args:
        engine: runs the model.
        rows: of the batch.
        length: of a row.
        objective: of the second documents.
        least: share of the second's gradient above which the first's is a leak.
    """
    assert isinstance(engine.model, DeepSeekV4)
    config, half = engine.model.config, length // 2
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.vocab_size, (rows, length), generator=generator)
    documents_BT = torch.arange(length).ge(half).long().expand(rows, -1)
    depths = 1 + config.num_nextn_predict_layers
    labels_BTK = torch.full((rows, length, depths), IGNORE)
    for k in range(depths):
        labels_BTK[:, half : length - 1 - k, k] = ids_BT[:, half + 1 + k :]
    grad_BTD = engine.embedding_gradient(Batch(ids_BT, documents_BT, labels_BTK), objective)
    if grad_BTD is None:
        return  # another pipeline stage holds the embedding, and judges
    if not bool(grad_BTD.isfinite().all()):
        return  # says nothing of isolation; train.recovery judges steps that are not finite
    leak, own = float(grad_BTD[:, :half].abs().max()), float(grad_BTD[:, half:].abs().max())
    if leak > least * own:
        yield f"a document's loss reaches the one before it (gradient {leak:.2g})"
    elif own == 0:
        yield "a document's loss does not reach its own tokens"
