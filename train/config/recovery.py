"""The ``train.recovery`` section: what a run does about steps that fail (reference C.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from conf.problems import refuse
from conf.ranges import number
from train.errors import UserError


class Remedy(StrEnum):
    """What is done about a step that fails."""

    none = "none"  # told in the log, counted in metrics.jsonl
    stop = "stop"  # the run ends with exit code 1
    skip = "skip"  # its update is not applied
    rollback = "rollback"  # back to the checkpoint before it, on with the data behind it


class Anticipatory(StrEnum):
    """When experts are chosen by earlier weights."""

    never = "never"
    after_rollback = "after_rollback"
    always = "always"


@dataclass
class RecoveryConfig:
    """Loss spikes and steps that are not finite.

    A step is a spike when its main loss lies more than ``threshold`` deviations above the median of
    the last ``window`` losses of its stage that were no spikes. The deviation is that of the noise
    from step to step, by medians, and at least 1 % of the median loss.

    Attributes:
        on_nonfinite: skip, rollback or stop, at once, when a loss or gradient norm is not finite.
        on_spike: none, skip (at once), rollback or stop (after ``patience`` spikes in a row).
        window: losses that a step is compared with; the first ``window`` steps of a stage pass.
        threshold: deviations above the median from which a loss is a spike.
        patience: failing steps in a row from which spikes are rolled back or stop the run.
        max_skips: updates in a row that may be left out; the next one stops the run. 0 = no bound.
        max_rollbacks: of the whole run; the next one stops it.
        skip_steps: batches left out behind those of the abandoned steps.
        anticipatory: never, after_rollback or always: anticipatory routing, by which experts are
            chosen by the weights of ``anticipatory_lag`` steps before.
        anticipatory_lag: in steps.
        anticipatory_steps: steps after a rollback that are routed so.
    """

    on_nonfinite: Remedy = Remedy.skip
    on_spike: Remedy = Remedy.none
    window: int = number(64, least=4)
    threshold: float = number(8.0, above=0)
    patience: int = number(3, least=1)
    max_skips: int = number(100, least=0)
    max_rollbacks: int = number(10, least=1)
    skip_steps: int = number(0, least=0)
    anticipatory: Anticipatory = Anticipatory.after_rollback
    anticipatory_lag: int = number(1, least=1)
    anticipatory_steps: int = number(100, least=1)

    @property
    def rolls_back(self) -> bool:
        """Whether anything leads to a rollback."""
        return Remedy.rollback in (self.on_nonfinite, self.on_spike)

    @property
    def may_anticipate(self) -> bool:
        """Whether a step of the run may be routed by earlier weights."""
        always = self.anticipatory is Anticipatory.always
        return always or (self.rolls_back and self.anticipatory is Anticipatory.after_rollback)

    def validate(self, checkpoint_every: int, keep_checkpoints: int) -> None:
        """Refuse values that cannot be.

        Args:
            checkpoint_every: of the ``train`` section.
            keep_checkpoints: of the ``train`` section.

        Raises:
            UserError: names the keys and their values.
        """
        refuse(UserError, self._problems(checkpoint_every, keep_checkpoints))

    def _problems(self, checkpoint_every: int, keep_checkpoints: int) -> Iterator[str]:
        prefix = "train.recovery"
        if self.on_nonfinite is Remedy.none:
            yield (
                f"{prefix}.on_nonfinite=none: an update that is not finite is never applied; say"
                " skip, rollback or stop"
            )
        if self.skip_steps and not self.rolls_back:
            yield (
                f"{prefix}.skip_steps={self.skip_steps} acts after a rollback, but nothing leads to"
                f" one: {prefix}.on_spike={self.on_spike.value}, on_nonfinite="
                f"{self.on_nonfinite.value}"
            )
        if not self.rolls_back:
            return
        key = "on_spike" if self.on_spike is Remedy.rollback else "on_nonfinite"
        if checkpoint_every == 0:
            yield (
                f"{prefix}.{key}=rollback needs checkpoints to go back to, but"
                f" train.checkpoint_every={checkpoint_every}"
            )
        if keep_checkpoints == 1:
            yield (
                f"{prefix}.{key}=rollback needs train.keep_checkpoints of 2 or more, or 0 (all):"
                f" with {keep_checkpoints}, one saved within a spike leaves none from before it"
            )
