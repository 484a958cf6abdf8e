"""Whole steps under context parallelism beside one process (reference P.2, Layout-free).

Bounds as in test_layouts.py: losses of the step within 1e-6, every gradient within 1e-5 by the
measure of docs/layouts.md. What gates and indexers choose is equal.
"""

# Legend: B rows, T tokens, S tokens of a shard, K prediction depths
from dataclasses import replace

import pytest
import torch

import model.context as context_module
from data.batch import IGNORE, Batch, BatchCounts
from model.attention.csa import CompressedSparseAttention
from model.kernels.indexer import index_topk_reference
from model.kernels.triton.launch import counted
from model.kv_exchange import Here
from model.transformer import DeepSeekV4
from parallel.context_parallel import ShardedRows
from tests.helpers import Rows, relative, run_distributed
from tests.parallel.ranks import (
    alone,
    forward_backward,
    gradients,
    objective,
    spread,
    worst_gradient,
)
from train.step import microbatches

# Rows of 256 tokens: as 701, 1399, 501, 1495 of 4096 are (odd, over shards' edges); one document;
# shards in which none begins; lengths that leave shards of 2, 4 or 8 without a new entry; padding.
ROW = 256
LENGTHS = (
    [43, 87, 31, 95], [256], [5, 251], [3] * 85, [100, 3, 3, 3, 3, 3, 3, 3, 3, 100], [61, 2, 130],
    [127, 129], [129, 127],
)  # fmt: skip
ONE_ROW = ([13, 6, 13],)  # shards of 16: one document over the edge, a window of 8 before it


def packed_rows(vocab_size, lengths=LENGTHS, row=ROW, depths=2):
    """Documents of given lengths, the last of which goes on behind the row, labels and all."""
    generator = torch.Generator().manual_seed(0)
    B = len(lengths)
    ids, documents = torch.zeros(B, row, dtype=torch.long), torch.full((B, row), -1)
    labels = torch.full((B, row, depths), IGNORE)
    for b, some in enumerate(lengths):
        begin = 0
        for number, length in enumerate(some):
            end = begin + length
            text = torch.randint(1, vocab_size, (length + depths,), generator=generator)
            ids[b, begin:end], documents[b, begin:end] = text[:length], number
            for k in range(depths):
                known = length - 1 - k if end < row else length
                labels[b, begin : begin + known, k] = text[1 + k : 1 + k + known]
            begin = end
    counts = BatchCounts(
        tokens=int((documents >= 0).sum()),
        targets_K=tuple(int((labels[..., k] != IGNORE).sum()) for k in range(depths)),
        documents=sum(map(len, lengths)),
    )
    return Rows(Batch(ids, documents, labels), counts)


def compare_step(rank, world, degrees, size, micro, checkpoint, changes, lengths=LENGTHS):
    reference = alone(size, **changes)
    rows = packed_rows(reference.model.config.vocab_size, lengths, max(map(sum, lengths)))
    engine, _ = spread(reference, degrees, checkpoint=checkpoint)
    one = forward_backward(reference, rows, len(lengths))
    many = forward_backward(engine, rows, len(lengths), micro)
    assert abs(float(many.total - one.total)) <= 1e-6 * float(one.total), (many.total, one.total)
    indexers = reference.model.config.num_indexers
    assert (one.losses["loss_indexer"] > 0) == (indexers > 0)
    for name, value in one.losses.items():
        if name == "loss_indexer" and not indexers:
            continue
        assert relative(many.losses[name], value) < 1e-6, (name, many.losses, one.losses)
    for name, load in one.expert_load.items():
        assert torch.equal(many.expert_load[name], load), name
    for name, value in one.monitors.items():
        if not name.startswith("stream_gain"):  # a mean over microbatches
            assert relative(many.monitors[name], value) < 1e-4, name
    mine, theirs = gradients(engine), gradients(reference)
    if degrees.get("pp", 1) == 1:
        assert mine.keys() == theirs.keys()
    everyones = engine.gather(set(mine))
    assert set().union(*everyones) == set(theirs)
    distance, name = worst_gradient(mine, {name: theirs[name] for name in mine})
    assert distance < 1e-5, (distance, name)
    compare_choices(engine, reference, rows, micro)


def compare_choices(engine, reference, rows, micro):
    """Experts of every token, and the set of entries of every query."""
    B, T = rows.whole.input_ids_BT.shape
    wanted, found = (
        e.choices(microbatches(rows, B, micro, e.data_rank, e.data_degree), objective(rows))
        for e in (reference, engine)
    )
    here = slice(engine.data_rank * len(found), (engine.data_rank + 1) * len(found))
    for theirs, mine in zip(wanted[here], found, strict=True):
        assert mine.keys() <= theirs.keys()
        for name, chosen in mine.items():
            expected = theirs[name].view(micro, T, -1).chunk(engine.shard.count, dim=1)
            chosen = chosen.view(micro, -1, chosen.shape[-1])
            expected = expected[engine.shard.index]
            if not name.endswith(".gate"):
                expected, chosen = expected.sort(-1).values, chosen.sort(-1).values
            assert torch.equal(chosen, expected), name


@pytest.mark.parametrize(("world", "degrees"), [(2, {"cp": 2})], ids=["cp2"])
def test_shards_of_rows_train_as_one_process(world, degrees):
    run_distributed(compare_step, world, degrees, "small", 4, "none", {})


def test_dense_layers_train_on_shards_as_one_process():
    """A rank reads the keys of all tokens before its shard; over several shards: the slow tests."""
    run_distributed(compare_step, 2, {"cp": 2}, "small", 8, "none", {"attention": "dense"})


def compare_triton(rank, world):
    changes = {"kernels": "triton", "index_topk": 2, "hc_sinkhorn_iters": 3}
    with counted() as launches:
        compare_step(rank, world, {"cp": world}, "small", 1, "none", changes, ONE_ROW)
    assert len(launches) >= 25  # kernels


@pytest.mark.slow
def test_triton_kernels_train_on_shards_as_one_process():
    """In Triton's interpreter, which takes a hundred times as long: one row of three documents."""
    run_distributed(compare_triton, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "torch", "compiled"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_kernels_train_dense_layers_on_shards(world, kernels):
    changes = {"kernels": kernels, "attention": "dense"}
    run_distributed(compare_step, world, {"cp": world}, "small", 4, "block", changes)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "torch", "compiled"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_kernels_train_on_shards_as_one_process(world, kernels):
    changes = {"kernels": kernels}
    run_distributed(compare_step, world, {"cp": world}, "small", 4, "none", changes)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_windows_and_blocks_over_several_shards_train_as_one_process(kernels):
    """64 tokens a rank; windows of 100, and HCA blocks of 128 of which a rank may hold no end."""
    changes = {"kernels": kernels, "sliding_window": 100, "compress_ratios": [0, 4, 128, 0]}
    run_distributed(compare_step, 4, {"cp": 4}, "small", 4, "none", changes)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("world", "degrees", "micro"),
    [
        (2, {"cp": 2}, 4),
        (4, {"cp": 4}, 2),
        (4, {"cp": 2, "dp_shard": 2}, 4),
        (4, {"cp": 2, "dp_shard": 1, "dp_replicate": 2}, 2),
        (2, {"cp": 2, "ep": 2}, 4),
        (4, {"cp": 2, "ep": 2}, 4),
        (4, {"cp": 2, "pp": 2}, 2),
        (8, {"cp": 2, "pp": 2, "dp_shard": 2, "ep": 2}, 2),
    ],
    ids=[
        "cp2",
        "cp4",
        "cp2xdp2",
        "cp2xddp2",
        "cp2-ep2",
        "cp2xdp2-ep2",
        "cp2xpp2",
        "cp2xdp2xpp2-ep2",
    ],
)
def test_context_layout_of_v4_tiny_trains_as_one_process(world, degrees, micro, checkpoint):
    run_distributed(compare_step, world, degrees, "tiny", micro, checkpoint, {})


# ---- planted faults ------------------------------------------------------------------------------
def shifted(real):
    """Each token before a shard stands one place too late."""

    def before(self, count, *x_BSC):
        S = x_BSC[0].shape[1]
        got = real(self, count, *x_BSC).wait()
        return Here(tuple(torch.cat((x[:, :-S].roll(1, dims=1), x[:, -S:]), dim=1) for x in got))

    return before


def without_gradients_of_others(real):
    def before(self, count, *x_BSC):
        S = x_BSC[0].shape[1]
        got = real(self, count, *x_BSC).wait()
        return Here(tuple(torch.cat((x[:, :-S].detach(), x[:, -S:]), dim=1) for x in got))

    return before


def own_gradients_alone(real):
    """The gradient of an entry stays where it arises; its owner gets its own part alone."""

    def entries(self, entries_BLK, plan):
        number_BL = plan.gathering.target_BF.chunk(self.shard.count, dim=1)[self.shard.index]
        whole = real(self, entries_BLK, plan).wait()[0].detach()
        padded = torch.cat((whole, whole[:, :1]), dim=1)
        place = number_BL[..., None].expand_as(entries_BLK)
        return Here((padded.scatter(1, place, entries_BLK)[:, :-1],))

    return entries


def of_plans(change):
    def make(real):
        return lambda *args: change(real(*args))

    return make


def with_local_positions(plan):
    if plan.shard.count == 1:
        return plan
    local_T = torch.arange(plan.position_BT.shape[1])
    return replace(plan, position_BT=torch.minimum(plan.position_BT, local_T))


def with_an_entry_twice(plan):
    """The last entry of each shard is its next one's first, too."""

    def change(p):
        if p.gathering is None:
            return p
        source_BE = p.gathering.source_BE.clone()
        holder_BE = source_BE // p.valid_BL.shape[1]
        first_BE = holder_BE[:, 1:] > holder_BE[:, :-1]
        source_BE[:, 1:] = torch.where(first_BE, source_BE[:, :-1], source_BE[:, 1:])
        return replace(p, gathering=replace(p.gathering, source_BE=source_BE))

    return replace(plan, compressed={m: change(p) for m, p in plan.compressed.items()})


def of_own_entries(real):
    """A query chooses among the entries of its own rank alone."""

    def begin(self, u_BTD, context):
        def topk(indexer, first_BT, stop_BT, *rest):
            if context.kv_exchange.shard.index:
                first_BT = torch.maximum(first_BT, stop_BT[:, :1])
            return index_topk_reference(indexer, first_BT, stop_BT, *rest)

        work, kept = real(self, u_BTD, context), self._index_topk
        take = work.take

        def take_with_fault():
            self._index_topk = topk
            try:
                return take()
            finally:
                self._index_topk = kept

        work.take = take_with_fault
        return work

    return begin


def labels_of_shards(real):
    """As if labels were made of the shard's own tokens."""

    def part(self, index, count):
        batch = real(self, index, count)
        labels_BTK = batch.labels_BTK.clone()
        for k in range(labels_BTK.shape[-1]):
            labels_BTK[:, -1 - k :, k] = IGNORE
        return replace(batch, labels_BTK=labels_BTK)

    return part


def without_indexer_loss(real):
    def training_context(self, *args):
        context = real(self, *args)
        context.indexer_loss = False
        return context

    return training_context


FAULTS = {
    "halo off by one": (ShardedRows, "tokens_before", shifted),
    "halo gradient dropped": (ShardedRows, "tokens_before", without_gradients_of_others),
    "gradients of entries dropped": (ShardedRows, "all_entries", own_gradients_alone),
    "local positions": (context_module, "build_sequence_plan", of_plans(with_local_positions)),
    "entry twice": (context_module, "build_sequence_plan", of_plans(with_an_entry_twice)),
    "top-k over local entries": (CompressedSparseAttention, "begin_entries", of_own_entries),
    "labels lost at the edge": (Batch, "part", labels_of_shards),
    "no indexer loss": (DeepSeekV4, "training_context", without_indexer_loss),
    "loads of shards": (ShardedRows, "add_up", lambda real: lambda self, counts: counts),
}


def plant_faults(rank, world):
    reference = alone()
    rows = packed_rows(reference.model.config.vocab_size)
    engine, _ = spread(reference, {"cp": world})
    one, theirs = forward_backward(reference, rows, len(LENGTHS)), gradients(reference)

    def off():
        engine.optimizer.zero_grad()
        many = forward_backward(engine, rows, len(LENGTHS), 4)
        losses = [relative(many.losses[name], value) for name, value in one.losses.items()]
        mine = gradients(engine)
        return max(losses), worst_gradient(mine, theirs)[0] if mine.keys() == theirs.keys() else 1.0

    for name, (owner, attribute, fault) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, fault(getattr(owner, attribute)))
            loss, gradient = off()
        assert loss > 1e-6 or gradient > 1e-5, (name, loss, gradient)
        assert gradient > 1e-4, (name, gradient)
    loss, gradient = off()
    assert loss < 1e-6, "all is as before"
    assert gradient < 1e-5
    before = gradients(engine)
    off()
    for name, again in gradients(engine).items():
        assert torch.equal(again, before[name]), f"{name} has other bits the second time"


def test_planted_faults_are_caught():
    """By the very bounds of this file, and far beyond them."""
    run_distributed(plant_faults, 2)
