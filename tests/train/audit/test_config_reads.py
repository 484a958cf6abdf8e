"""A key counts as read when code that uses it asks for it, and only then.

Oracle: hand-made sections of every form that RunConfig has (nested, lists, dicts of records).
"""

import copy
from dataclasses import asdict, dataclass, field, replace

from tests.train.audit.config_reads import ConfigReads, leaves


@dataclass
class Part:
    size: int = 1
    rate: float = 0.5

    def validate(self):
        if self.rate < 0:
            raise ValueError("rate")

    def area(self):
        return self.size**2


@dataclass
class Whole:
    name: str = "a"
    part: Part = field(default_factory=Part)
    stages: list[Part] = field(default_factory=list)
    sources: dict[str, Part] = field(default_factory=dict)


def test_every_leaf_is_listed():
    config = Whole(stages=[Part(), Part()], sources={"x": Part()})
    assert [key for key, _ in leaves(config)] == [
        "name", "part.size", "part.rate", "stages.size", "stages.rate", "sources.x.size",
        "sources.x.rate",
    ]  # fmt: skip
    assert [key for key, _ in leaves(Whole())][-2:] == ["stages", "sources"]


def test_reads_are_noted_and_validation_copies_and_dumps_are_not():
    config = Whole(stages=[Part(), Part()], sources={"x": Part()})
    every = [key for key, _ in leaves(config)]
    reads = ConfigReads(config)
    config.part.validate()
    asdict(config)
    copy.deepcopy(config)
    clone = replace(config.part)
    assert reads.unread() == every
    assert config.part.area() == 1
    assert config.stages[1].rate == 0.5
    assert clone.rate == 0.5
    assert config.sources["x"].size == 1
    assert reads.unread() == ["name", "stages.size", "sources.x.rate"]


def test_stop_gives_the_classes_back():
    config = Whole(stages=[Part()])
    reads = ConfigReads(config)
    assert isinstance(config.part, Part)
    assert type(config) is not Whole
    reads.stop()
    assert type(config) is Whole
    assert type(config.stages[0]) is Part
    assert config == Whole(stages=[Part()])
