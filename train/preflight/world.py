"""What a run was started on: its processes, their device, and the memory that is free there."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from parallel.launch import launched_here, launched_world_size
from parallel.mesh import init_process_group
from train.config.schema import Device
from train.errors import UserError

GB = 1e9
RUNTIME = {"cpu": 1.2e9, "cuda": 0.8e9}  # interpreter and libraries, CUDA context


@dataclass(frozen=True)
class World:
    """What the process group was started on.

    Attributes:
        ranks: processes.
        device: cpu or cuda.
        bytes_per_rank: memory that one of them may use; 0 where CUDA is asked for and missing.
        device_bytes: all that the CUDA device has, of which others may hold a part; 0: not known.
    """

    ranks: int
    device: str
    bytes_per_rank: int
    device_bytes: int = 0

    @property
    def memory(self) -> str:
        """Of one rank, as text: ``11.2 of 24.0 GB free``, or one number where they are equal."""
        free, total = gb(self.bytes_per_rank), gb(self.device_bytes)
        if not self.device_bytes or free == total:
            return free
        return f"{free.removesuffix(' GB')} of {total} free"


def this_world(device: Device) -> World:
    """Ranks from torchrun's variables, memory from the machine; of a CUDA device what is free.

    Raises:
        UserError: more ranks on this machine than CUDA devices.
    """
    ranks = launched_world_size()
    local = launched_here()
    cuda = torch.cuda.is_available() if device != Device.cpu else False
    if device == Device.cuda and not cuda:
        return World(ranks, "cuda", 0)
    if not cuda:
        return World(ranks, "cpu", machine_memory() // local)
    index = _local_rank()
    if index >= torch.cuda.device_count():
        raise UserError(
            f"{local} ranks on this machine, but it has {torch.cuda.device_count()} CUDA device(s)"
        )
    return World(ranks, "cuda", *_free_and_total(index))


def poorest(world: World) -> World:
    """The same with the memory of the CUDA rank that has the least free. Collective over ranks.

    Every rank asks its own device: asking another's would put a context there.
    """
    if world.device != "cuda" or world.ranks == 1 or not world.bytes_per_rank:
        return world
    init_process_group(torch.device("cuda", _local_rank()))
    found = [(0, 0)] * world.ranks
    dist.all_gather_object(found, (world.bytes_per_rank, world.device_bytes))
    free, total = min(found)
    return replace(world, bytes_per_rank=free, device_bytes=total)


def _free_and_total(index: int) -> tuple[int, int]:
    """Bytes of a CUDA device that this process holds or could, and all that it has.

    The driver counts as taken what torch's allocator keeps here and this process's own context,
    which asking makes. The context's size is not told: up to ``RUNTIME`` of what is taken counts
    as its own, since that much of every need is the runtime's.
    """
    free, total = torch.cuda.mem_get_info(index)
    kept = torch.cuda.memory_reserved(index)
    return min(total, free + kept + round(RUNTIME["cuda"])), total


def gb(size: float) -> str:
    """Bytes in GB, as text."""
    return f"{size / GB:,.1f} GB"


def machine_memory() -> int:
    """Bytes of RAM, or of this container where it is limited to less."""
    total = psutil.virtual_memory().total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
