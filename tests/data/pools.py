"""The pools of a pass, one after the other."""

from collections.abc import Iterator

from data.mixture import Mixture
from data.pool import Pool


def pools_of(mixture: Mixture, epoch: int = 0, seq_len: int = 8) -> Iterator[Pool]:
    """The pools of an epoch of sources without weights."""
    number, place = 0, mixture.start
    while (pool := mixture.pool(epoch, number, place, seq_len)) is not None:
        yield pool
        number, place = number + 1, pool.after
