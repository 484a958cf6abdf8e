"""Live bytes are those of storages that exist, apart from views and from what was there before."""

import torch

from scripts.benchmarks.live_bytes import LiveBytes

KB = 1024


def test_storages_are_counted_once_and_until_they_go():
    before = torch.zeros(KB)
    with LiveBytes() as live:
        a = torch.zeros(2 * KB)  # 8 KB
        b = (a.view(2, KB) + before)[1:]  # 8 KB more, held by a view
        before.mul_(2)
        assert live.now == 16 * KB
        del a
        assert live.now == 8 * KB
        b = b.clone()  # 4 KB beside the 8 that go
        assert live.now == 4 * KB
    assert b.numel() == KB
    assert live.most == 16 * KB


def test_what_a_backward_pass_needs_is_alive_until_it_ran():
    x = torch.ones(KB, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sum()
        kept = live.now
        y.backward()
        del y
    assert kept >= 4 * KB, "the result of exp"
    assert live.now == 4 * KB, "the gradient"
