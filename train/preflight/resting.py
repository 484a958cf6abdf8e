"""What a rank keeps off its device, and what travels between device and host in a step."""

from __future__ import annotations

from dataclasses import dataclass

PCIE_BYTES_PER_SECOND = 32e9  # PCIe 4.0 x16, one direction, nominal
# DeepSpeed's own: pinned buffers between drive and host, each for the largest group of values.
_BUFFERS, _SUB_GROUP = 5, 1e9


@dataclass(frozen=True)
class Resting:
    """Bytes of a rank off its device.

    Attributes:
        host: in host memory, pinned.
        disk: on NVMe.
        down: that travel from the device to the host in a step.
        up: that travel the other way.
    """

    host: int = 0
    disk: int = 0
    down: int = 0
    up: int = 0

    def text(self) -> str:
        """In one line; empty: everything is on the device."""
        if not self.host + self.disk:
            return ""
        disk = f", {self.disk / 1e9:,.1f} GB on NVMe" if self.disk else ""
        return (
            f"{self.host / 1e9:,.1f} GB of a rank in host memory{disk}; a step moves"
            f" {self.down / 1e9:,.1f} GB down and {self.up / 1e9:,.1f} GB up, {self.seconds:.2f} s"
            " at PCIe 4.0 x16's nominal rate"
        )

    @property
    def seconds(self) -> float:
        """Least time that they travel for in a step: both ways at once, at PCIe's nominal rate."""
        return max(self.down, self.up) / PCIE_BYTES_PER_SECOND


@dataclass(frozen=True)
class Values:
    """fp32 values of a rank's share of the model.

    Attributes:
        muon: of parameters that Muon owns.
        adamw: of those that AdamW owns.
        bf16: of weights that the device may hold in bf16 alone.
    """

    muon: float
    adamw: float
    bf16: float

    @property
    def all(self) -> float:
        """Of every parameter."""
        return self.muon + self.adamw


def rest_of_torch(offload: str, here: Values, states: float) -> Resting:
    """What ``parallel.offload`` keeps on the host.

    Args:
        offload: its value.
        here: of this rank.
        states: bytes of momentum and moments.
    """
    if offload == "none":
        return Resting()
    momentum, adamw = 4 * here.muon, 4 * here.adamw
    if offload == "optimizer":  # AdamW's gradient and weight go down, the weight comes up
        return Resting(round(states), 0, round(momentum + 2 * adamw), round(momentum + adamw))
    both = momentum + 4 * min(here.bf16, here.muon)
    return Resting(round(states + 4 * here.bf16), 0, round(both + adamw), round(both + adamw))


def rest_of_zero(optimizer: str, parameters: str, here: Values, ranks: int) -> Resting:
    """What DeepSpeed keeps on the host and on NVMe.

    Masters, gradients and AdamW's moments rest with the optimizer, Muon's momentum on the host
    beside it. What goes to NVMe passes through buffers of the largest flat group each. A step
    brings whole gradients down and new weights up; of Muon's matrices masters and momentum come up
    and go down once more.

    Args:
        optimizer: ``engine.offload_optimizer``.
        parameters: ``engine.offload_parameters``.
        here: of the whole model.
        ranks: that share it.
    """
    masters = 4 * (2 * here.all + 2 * here.adamw) / ranks
    momentum = 4 * here.muon / ranks
    weights = 4 * here.all / ranks
    host = disk = traffic = 0.0
    if optimizer != "none":
        host, traffic = momentum, 4 * here.all / ranks + 2 * momentum
        group = min(max(here.muon, here.adamw), _SUB_GROUP)
        buffers = _BUFFERS * 4 * group / ranks
        disk, host = (masters, host + buffers) if optimizer == "nvme" else (0.0, host + masters)
    if parameters != "none":
        traffic += 2 * weights
        disk, host = (disk + weights, host) if parameters == "nvme" else (disk, host + weights)
    return Resting(round(host), round(disk), round(traffic), round(traffic))
