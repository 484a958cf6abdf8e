"""What a study is: ``conf/study/NAME.yaml`` as typed sections, checked when it is read.

A study asks one question of several *arms*, each a list of overrides of ``train/pretrain.py``. All
arms share model, data, tokens, decay horizon and seeds (``conf/study/budget``); each has a grid of
learning rates of its own, since the best one of another arm would be a handicap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts.studies.sections import (
    ArmConfig,
    CatchUpConfig,
    LadderConfig,
    LawConfig,
    ProbeConfig,
    SearchConfig,
    SequentialConfig,
    TransferConfig,
)
from train.config.command_line import CONF
from train.config.load import describe
from train.config.values import shape_problems, shown, type_of, unknown_key
from train.errors import Problems, UserError
from train.probes.tasks import ALL_NEEDLES, LEAST_TOKENS

STUDIES = CONF / "study"
GRID_STEP = 1.42  # of rates whose optimum is asked for: a square root of 2, rounded up
AGAIN = "again"  # the arm that repeats the baseline from another initialisation (A/A)


@dataclass
class StudyConfig:
    """Everything that fixes a study.

    Attributes:
        question: in one line.
        base: overrides of every run.
        arms: by name.
        baseline: the arm that every other is compared with.
        steps: optimizer steps of a run.
        evaluations: how often a run is evaluated, spread evenly; the last is the result.
        seeds: of data order and initialisation, the same in every arm.
        search: the choice of learning rates.
        catch_up: steps to another arm's loss.
        law: of the loss over FLOPs.
        ladder: steps to another kind of arm's loss, at several lengths.
        transfer: of the best learning rate from size to size.
        probe: questions whose answers are told beside the loss.
        again: also run the baseline from other initial weights (A/A, the noise floor).
        level: of the two-sided test, a fraction.
        sequential: verdicts before all seeds are spent.
    """

    question: str = ""
    base: list[str] = field(default_factory=list)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    baseline: str = ""
    steps: int = 0
    evaluations: int = 4
    seeds: list[int] = field(default_factory=list)
    search: SearchConfig = field(default_factory=SearchConfig)
    catch_up: CatchUpConfig = field(default_factory=CatchUpConfig)
    law: LawConfig = field(default_factory=LawConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    again: bool = True
    level: float = 0.05
    sequential: SequentialConfig = field(default_factory=SequentialConfig)

    def validate(self) -> None:
        """Refuse what cannot give an answer.

        Raises:
            UserError: names the keys and their values.
        """
        for ok, message in (
            *self._basic_checks(), *self._arm_checks(), *self._catch_up_checks(),
            *self._sequential_checks(), *self._law_checks(), *self._ladder_checks(),
            *self._transfer_checks(),
            *self._probe_checks(),
        ):  # fmt: skip
            if not ok:
                raise UserError(message)

    def _basic_checks(self) -> list[tuple[bool, str]]:
        search = self.search
        return [
            (self.steps > 0, f"steps={self.steps} must be above 0"),
            (
                0 < self.evaluations <= self.steps,
                f"evaluations={self.evaluations} must lie in 1 .. steps={self.steps}",
            ),
            (len(self.seeds) >= 2, f"seeds={self.seeds}: a test needs at least 2"),
            (len({*self.seeds}) == len(self.seeds), f"seeds={self.seeds} repeat themselves"),
            (
                search.seed not in self.seeds,
                f"search.seed={search.seed} is among seeds={self.seeds}: the runs that choose a"
                " learning rate must not judge it",
            ),
            (0 < search.fraction <= 1, f"search.fraction={search.fraction} must lie in (0, 1]"),
            (search.factor > 1, f"search.factor={search.factor} must be above 1"),
            (search.extensions >= 0, f"search.extensions={search.extensions} must be 0 or more"),
            (0 < self.level < 1, f"level={self.level} must lie in (0, 1)"),
        ]

    def _arm_checks(self) -> list[tuple[bool, str]]:
        names = list(self.arms)
        checks = [
            (self.baseline in names, f"baseline={self.baseline} must be one of arms={names}"),
            (AGAIN not in names, f"arms.{AGAIN} is the name of the repeated baseline"),
        ]
        for name, arm in self.arms.items():
            checks += [
                (
                    arm.evaluates in ("", *names) and arm.evaluates != name,
                    f"arms.{name}.evaluates={arm.evaluates} must be another of arms={names}",
                ),
                (
                    0 < arm.fraction <= 1,
                    f"arms.{name}.fraction={arm.fraction} must lie in (0, 1]",
                ),
                (
                    arm.steps >= 0 and (not arm.steps or arm.fraction == 1),
                    f"arms.{name}.steps={arm.steps} must be 0 or more, and stands alone:"
                    f" arms.{name}.fraction={arm.fraction}",
                ),
                (
                    arm.like in ("", *names) and arm.like != name,
                    f"arms.{name}.like={arm.like} must be another of arms={names}",
                ),
                *self._pace_checks(name, arm),
                (
                    bool(arm.evaluates) or len(self.grid(name)) >= 3,
                    f"arms.{name}.lr={self.grid(name)} needs 3 values: a best one between others",
                ),
                (
                    self.grid(name) == sorted({*self.grid(name)}),
                    f"arms.{name}.lr={self.grid(name)} must ascend",
                ),
            ]
        return checks

    def _pace_checks(self, name: str, arm: ArmConfig) -> list[tuple[bool, str]]:
        """Of an arm whose steps follow from another's."""
        names = list(self.arms)
        asked = {"seconds_of": arm.seconds_of, "flops_of": arm.flops_of}
        checks = [
            (
                not all(asked.values()),
                f"arms.{name}.seconds_of={arm.seconds_of} and arms.{name}.flops_of={arm.flops_of}:"
                " one of them fixes its steps",
            )
        ]
        for key, other in asked.items():
            paced = any(self.arms[a].paced_by for a in (arm.like, other) if a in names)
            possible = other in names and bool(arm.like) and not arm.steps and not paced
            checks.append(
                (
                    not other or possible,
                    f"arms.{name}.{key}={other} must be one of arms={names} with steps of its own,"
                    f" and needs arms.{name}.like={arm.like}, such an arm too",
                )
            )
        return checks

    def _catch_up_checks(self) -> list[tuple[bool, str]]:
        ask, names = self.catch_up, list(self.arms)
        if not ask.arm:
            return []
        return [
            (ask.arm in names, f"catch_up.arm={ask.arm} must be one of arms={names}"),
            (ask.to in names, f"catch_up.to={ask.to} must be one of arms={names}"),
            (
                ask.fractions == sorted({*ask.fractions})
                and all(0 < f < 1 for f in ask.fractions)
                and bool(ask.fractions),
                f"catch_up.fractions={ask.fractions} must ascend inside (0, 1)",
            ),
        ]

    def _law_checks(self) -> list[tuple[bool, str]]:
        arms, names = self.law.arms, list(self.arms)
        return [
            (
                not arms or (len({*arms}) == len(arms) >= 5 and {*arms} <= {*names}),
                f"law.arms={arms} must be at least 5 of arms={names}, each once: a law has three"
                " numbers, and one point is predicted",
            )
        ]

    def _ladder_checks(self) -> list[tuple[bool, str]]:
        ask, names = self.ladder, list(self.arms)
        if not ask.arms and not ask.to:
            return []
        known = {*ask.arms, *ask.to} <= {*names}
        trials = {n: self.trials(n) for n in (*ask.arms, *ask.to)} if known else {}
        return [
            (
                known and len(ask.arms) >= 3 and len(ask.to) >= 3,
                f"ladder.arms={ask.arms} and ladder.to={ask.to} must be at least 3 of arms={names}",
            ),
            (
                not known
                or all(
                    (steps := [self.arms[n].steps for n in side]) == sorted({*steps} - {0})
                    for side in (ask.arms, ask.to)
                ),
                f"ladder.arms={ask.arms} and ladder.to={ask.to} need arms.NAME.steps that ascend",
            ),
            (
                len({*trials.values()}) <= 1,
                f"ladder: arms must be tuned by equally many trials, not {trials}",
            ),
        ]

    def _transfer_checks(self) -> list[tuple[bool, str]]:
        ask, names = self.transfer, list(self.arms)
        if not ask.along:
            return []
        checks = [
            (ask.factor > 1, f"transfer.factor={ask.factor} must be above 1"),
            (
                self.search.fraction == 1 and not self.again and not self.is_sequential,
                "transfer takes its runs as they are searched: search.fraction="
                f"{self.search.fraction}, again={str(self.again).lower()} and"
                f" sequential.looks={self.sequential.looks} must be 1, false and []",
            ),
            (
                not any(arm.evaluates or arm.tune or arm.paced_by for arm in self.arms.values()),
                "transfer: arms differ in size; evaluates, tune, seconds_of and flops_of have no"
                " place there",
            ),
        ]
        for what, arms in ask.along.items():
            checks.append(
                (
                    len({*arms}) == len(arms) >= 2 and {*arms} <= {*names},
                    f"transfer.along.{what}={arms} must be 2 or more of arms={names}, each once",
                )
            )
        for name in names:
            grid = self.grid(name)
            steps = [after / before for before, after in pairwise(grid)]
            checks.append(
                (
                    max([self.search.factor, *steps]) <= GRID_STEP,
                    f"arms.{name}.lr={grid} and search.factor={self.search.factor} must step by"
                    f" {GRID_STEP:g} at most",
                )
            )
        return checks

    def _probe_checks(self) -> list[tuple[bool, str]]:
        ask = self.probe
        if not ask.needle:
            return []
        silent = [name for name, arm in self.arms.items() if arm.evaluates]
        return [
            (
                not silent,
                f"probe.needle={ask.needle} asks checkpoints, and arms={silent} leave none: they"
                " evaluate another arm's",
            ),
            (
                ask.needle in ALL_NEEDLES,
                f"probe.needle={ask.needle} must be one of {', '.join(ALL_NEEDLES)}",
            ),
            (
                bool(ask.lengths) and min(ask.lengths) >= LEAST_TOKENS,
                f"probe.lengths={ask.lengths} must be numbers of {LEAST_TOKENS} or more",
            ),
            (
                ask.depths >= 1 and ask.count >= 1,
                f"probe.depths={ask.depths} and probe.count={ask.count} must be 1 or more",
            ),
        ]

    def trials(self, arm: str) -> int:
        """Runs of an arm's search, if its first grid holds the best learning rate."""
        return len(self.grid(arm)) + sum(len(values) for values in self.tune_of(arm).values())

    def tune_of(self, arm: str) -> dict[str, list[str]]:
        """Keys that an arm's search tries after the learning rate."""
        config = self.arms[arm]
        return config.tune or (self.arms[config.like].tune if config.like else {})

    def _sequential_checks(self) -> list[tuple[bool, str]]:
        asked, seeds = self.sequential, len(self.seeds)
        looks = asked.looks
        return [
            (
                not looks or (looks == sorted({*looks}) and looks[0] >= 2 and looks[-1] == seeds),
                f"sequential.looks={looks} must ascend from 2 or more to the number of"
                f" seeds={self.seeds}, which is {seeds}",
            ),
            (
                0 < asked.spending <= 10,
                f"sequential.spending={asked.spending} must lie in (0, 10]",
            ),
            (
                0 <= asked.futility <= 0.5,
                f"sequential.futility={asked.futility} must lie in [0, 0.5]",
            ),
            (0 < asked.power < 1, f"sequential.power={asked.power} must lie in (0, 1)"),
        ]

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds at which verdicts may fall; one where the study is not sequential."""
        return tuple(self.sequential.looks) or (len(self.seeds),)

    @property
    def is_sequential(self) -> bool:
        """Whether arms may end before all seeds are spent."""
        return bool(self.sequential.looks) and len(self.arms) > 1

    def grid(self, arm: str) -> list[float]:
        """First learning rates of an arm's search."""
        config = self.arms.get(arm, ArmConfig())
        own = config.lr or self.arms.get(config.like, ArmConfig()).lr
        return list(own or self.arms.get(self.baseline, ArmConfig()).lr)

    def overrides_of(self, arm: str) -> list[str]:
        """What an arm changes, with what it takes from another."""
        config = self.arms[arm]
        return [*(self.arms[config.like].overrides if config.like else []), *config.overrides]


ConfigStore.instance().store("study_schema", StudyConfig)


def study_names() -> list[str]:
    """Every study that ``conf/study`` holds."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def load_study(name: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study.

    Args:
        name: of a file in ``conf/study``.
        overrides: keys of :class:`StudyConfig`, such as ``steps=200``.

    Raises:
        UserError: there is no such study, an unknown key, or values that cannot be.
    """
    if name not in study_names():
        raise UserError(f"study={name}: conf/study has {', '.join(study_names())}")
    _check_overrides(name, overrides)
    try:
        with initialize_config_dir(str(STUDIES), version_base=None):
            cfg = compose(name, list(overrides))
        study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConfig), _own(cfg)))
    except OmegaConfBaseException as error:
        raise UserError(f"study={name}: {describe(error)}") from error
    except HydraException as error:
        cause = error.__cause__
        known = isinstance(cause, OmegaConfBaseException)
        text = describe(cause) if known else str(error).splitlines()[0]
        raise UserError(f"study={name}: {text}") from error
    assert isinstance(study, StudyConfig)
    study.validate()
    return study


def _check_overrides(name: str, overrides: Sequence[str]) -> None:
    """Refuse keys that a study has not, and values that they cannot take."""
    problems = Problems()
    for arg in overrides:
        try:
            override = OverridesParser.create().parse_override(arg)
        except HydraException:
            problems.lines.append(f"study={name}: cannot read {shown(repr(arg))}: give KEY=VALUE")
            continue
        if override.is_sweep_override():
            problems.lines.append(f"study={name}: {arg}: one value a key; a list stands in [ ]")
            continue
        if override.is_delete():  # it has no value, and compose knows what is there
            continue
        if (STUDIES / override.key_or_group).is_dir():  # a group of files
            continue
        path, value = override.key_or_group.split("."), override.value()
        if type_of(path) is not None and unknown_key(path, StudyConfig):
            problems.lines.append(
                f"study={name}: {arg} is a key of its runs: give base=[{arg}], with all of the base"
                " that the study has, or an arm's overrides"
            )
            continue
        for part in reversed(path):
            value = {part: value}
        lines = shape_problems(value, StudyConfig, "")
        problems.lines += (f"study={name}: {line}" for line in lines)
    problems.refuse()


def _own(cfg: DictConfig) -> DictConfig:
    """Without what Hydra adds."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
