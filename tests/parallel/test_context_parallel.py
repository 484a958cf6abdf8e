"""What context parallelism brings from other ranks, against the same of whole rows in float64.

Exchanges move values and add up gradients: forward they are exact, and in float64 the sums of
gradients, of at most 8 terms here, differ from one process's by a few 1e-16.
"""

# Legend: B rows, T tokens of a row, S of a shard, C channels
import pytest
import torch
import torch.distributed as dist

from model.attention.compressor import Compressor
from model.context import build_context
from model.kernels.attention import EntrySet
from model.kernels.select import select
from model.kv_exchange import WholeRows
from model.sequence_plan import SequenceShard, build_sequence_plan
from parallel.context_parallel import ShardedRows, rows_sent
from tests.helpers import relative, run_distributed, small_config

# Rows of 48 tokens. Document ends anywhere; one document; shards without a document's start; two of
# padding; documents so short that whole shards have no entry.
LENGTHS = ([7, 14, 5, 15], [48], [3, 45], [20], [3] * 16, [23, 2, 23])
ROW = 48


def documents(lengths=LENGTHS, row=ROW):
    ids = torch.full((len(lengths), row), -1)
    for b, some in enumerate(lengths):
        begin = 0
        for number, length in enumerate(some):
            ids[b, begin : begin + length] = number
            begin += length
    return ids


def shard_of(x, group, dim=1):
    return x.chunk(group.size(), dim=dim)[group.rank()]


@pytest.mark.core
@pytest.mark.parametrize("count", [1, 3, 4, 7, 11, 40])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rows_sent_are_those_that_each_rank_lacks(ranks, count):
    size = 4
    for rank in range(ranks):
        first = rank * size
        wanted = list(range(max(0, first - count), first))
        sent = [rows_sent(size, count, sender, ranks)[rank] for sender in range(ranks)]
        got = [s * size + t for s, rows in enumerate(sent) for t in range(size)[rows]]
        assert got == wanted


@pytest.mark.core
@pytest.mark.parametrize("ratio", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_shards_of_a_plan_make_the_whole_plan(count, ratio):
    """Positions, visibility, and every entry once, at the rank that holds its last token."""
    ids, window = documents(), 6
    whole = build_sequence_plan(ids, (ratio,), window)
    entries, size = whole.compressed[ratio], ROW // count
    taken = [[] for _ in LENGTHS]
    for index in range(count):
        part = build_sequence_plan(ids, (ratio,), window, SequenceShard(index, count))
        here, compressed = slice(index * size, (index + 1) * size), part.compressed[ratio]
        first_key = max(0, here.start - window + 1)
        for name in ("valid_BT", "position_BT", "document_BT", "length_BT"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[:, here]), name
        assert torch.equal(part.start_BT, (whole.start_BT[:, here] - first_key).clamp(min=0))
        for name in ("first_BT", "stop_BT"):
            expected = getattr(entries, name)[:, here]
            assert torch.equal(getattr(compressed, name), expected), name
        L = compressed.valid_BL.shape[1]
        for b in range(len(LENGTHS)):
            held = compressed.valid_BL[b].nonzero().flatten().tolist()
            for place in held:
                number = int(compressed.gathering.target_BF[b, index * L + place])
                assert int(compressed.gathering.source_BE[b, number]) == index * L + place
                taken[b].append(number)
                first = here.start - min(ratio - 1, here.start)
                tokens = compressed.disjoint.tokens_BLM[b, place] + first
                assert torch.equal(tokens, entries.disjoint.tokens_BLM[b, number])
                assert here.start <= int(tokens[-1]) < here.stop
                assert compressed.position_BL[b, place] == entries.position_BL[b, number]
    assert taken == [list(range(int(n))) for n in entries.valid_BL.sum(1)]


def compare_exchanges(rank, world):
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(0)
    exchange = ShardedRows(group)
    whole = torch.randn(3, ROW, 5, dtype=torch.float64, generator=generator)
    weights = torch.randn(world, 3, 2 * ROW, 5, dtype=torch.float64, generator=generator)
    for count in (1, 4, ROW // world, ROW // world + 3, ROW):
        x, size = whole.clone().requires_grad_(), ROW // world
        first = [max(0, r * size - count) for r in range(world)]
        wanted = [x[:, first[r] : (r + 1) * size] for r in range(world)]
        sum((w * weights[r, :, : w.shape[1]]).sum() for r, w in enumerate(wanted)).backward()
        mine = shard_of(whole, group).clone().requires_grad_()
        got, twice = exchange.tokens_before(count, mine, 2 * mine).wait()
        assert torch.equal(got, wanted[rank])
        assert torch.equal(twice, 2 * wanted[rank])
        ((got + twice) / 3 * weights[rank, :, : got.shape[1]]).sum().backward()
        assert relative(mine.grad, shard_of(x.grad, group)) < 1e-14
    assert exchange.tokens_before(0, mine).wait()[0] is mine


def test_tokens_before_and_their_gradients_are_those_of_whole_rows():
    run_distributed(compare_exchanges, 4)


def compare_compressor(rank, world):
    """Entries, attention over them and the window, choice and loss of the indexer."""
    config, group = small_config(kernels="reference"), dist.group.WORLD
    ids, B = documents(), len(LENGTHS)
    exchange = ShardedRows(group)
    for overlap, ratio in ((True, 4), (False, 8), (True, 8), (False, 3)):
        config.compress_ratios = [0, ratio, ratio, 0]
        torch.manual_seed(1)
        compressor = Compressor(config, ratio, 16, overlap).double()
        for parameter in compressor.parameters():
            torch.nn.init.normal_(parameter)
        q, u, kv = (
            torch.randn(B, ROW, *shape, dtype=torch.float64) for shape in ((2, 16), (32,), (16,))
        )
        sink, results, grads = torch.randn(2, dtype=torch.float64), [], []
        weight = torch.randn(B, ROW, 2, 16, dtype=torch.float64)
        for reach in (WholeRows(), exchange):
            inputs = [
                x if reach is not exchange else shard_of(x, group) for x in (q, u, kv, weight)
            ]
            q_, u_, kv_ = (x.clone().requires_grad_() for x in inputs[:3])
            context = build_context(config, ids, True, kv_exchange=reach)
            plan = context.plan.compressed[ratio]
            compressor.zero_grad()
            coming = compressor(u_, plan, context.entry_rope[ratio], reach, u_.dtype)
            (keys,) = reach.tokens_before(config.sliding_window - 1, kv_).wait()
            entries = coming.wait()
            used = EntrySet(entries, plan.first_BT, plan.stop_BT, bounds=plan.bounds)
            start = context.plan.start_BT
            out = select("attention", "reference")(
                q_, keys, sink, start, config.sliding_window, used
            )
            (out.o_BTHK * inputs[3]).sum().backward()
            weights = {n: p.grad.clone() for n, p in compressor.named_parameters()}
            if reach is exchange:
                for grad in weights.values():
                    dist.all_reduce(grad)
            results.append((out.o_BTHK.detach(), entries.detach()))
            grads.append(([q_.grad, u_.grad, kv_.grad], weights))
        (whole, all_entries), (part, same_entries) = results
        # the compressor computes in fp32 whatever its input
        assert relative(same_entries, all_entries) < 1e-6
        assert relative(part, shard_of(whole, group)) < 1e-6
        for theirs, mine in zip(grads[0][0], grads[1][0], strict=True):
            assert relative(mine, shard_of(theirs, group)) < 1e-5
        for name, theirs in grads[0][1].items():
            assert relative(grads[1][1][name], theirs) < 1e-5, name


@pytest.mark.parametrize("world", [2, 4])
def test_entries_and_attention_of_shards_are_those_of_whole_rows(world):
    run_distributed(compare_compressor, world)
