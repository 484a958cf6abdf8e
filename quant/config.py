"""The ``quant`` section of a run: which tensors are quantised, and how (reference C.5 to C.7).

A recipe fixes every part; a part that is given beside it overrides the recipe. Plain dataclasses
without ``frozen`` or ``Literal``, so that Hydra can compose them. From which stage on it acts is
the plan's business (``train.stages[].quantised``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum

from conf.problems import refuse
from quant.errors import ConfigError


class Recipe(StrEnum):
    """A name for a whole set of parts."""

    none = "none"
    fp4_qat = "fp4_qat"  # what the paper trains with FP4: experts, indexer; FP8 KV beside it
    deployed = "deployed"  # every tensor as the released checkpoint stores it
    fp8 = "fp8"  # FP8 training of the linears, forward and backward


class ExpertFormat(StrEnum):
    """Format of the routed experts' weights."""

    none = "none"
    fp4 = "fp4"  # blocks of 32, seen by the matmul as FP8 without loss
    fp8 = "fp8"  # blocks of 128x128


class QuantEngine(StrEnum):
    """What multiplies quantised operands."""

    emulated = "emulated"  # operands rounded to their format, matmul in the compute dtype
    transformer_engine = "transformer_engine"  # FP8 tensor cores


@dataclass(frozen=True)
class Parts:
    """What is quantised, all decided.

    Attributes:
        experts: weights of the routed experts.
        shared_experts: FP8 weights of the shared experts.
        attention: FP8 weights of wq_a, wq_b, wkv, wo_a, wo_b and the indexer's wq_b.
        mtp: FP8 weights of e_proj and h_proj.
        activations: FP8 inputs (1x128) of the linears whose weights are quantised, but for wo_a,
            which the released code runs in bf16.
        gradients: FP8 operands in dgrad and wgrad too; wo_a is then like the others.
        kv: FP8 KV entries (blocks of 64), rope dims in bf16.
        indexer: Hadamard transform and FP4 on the indexer's queries and keys.
        stored: bf16 for every tensor that the released checkpoint stores in bf16.
    """

    experts: ExpertFormat = ExpertFormat.none
    shared_experts: bool = False
    attention: bool = False
    mtp: bool = False
    activations: bool = False
    gradients: bool = False
    kv: bool = False
    indexer: bool = False
    stored: bool = False


_RECIPES = {
    Recipe.none: Parts(),
    Recipe.fp4_qat: Parts(experts=ExpertFormat.fp4, kv=True, indexer=True),
    Recipe.deployed: Parts(ExpertFormat.fp4, True, True, True, True, False, True, True, True),
    Recipe.fp8: Parts(ExpertFormat.fp8, True, True, True, True, True),
}


@dataclass
class QuantConfig:
    """Recipe and exceptions from it.

    Attributes:
        recipe: none, fp4_qat, deployed or fp8.
        engine: emulated, or transformer_engine.
        experts: none, fp4 or fp8; this and the rest: see :class:`Parts`, null = as the recipe.
    """

    recipe: Recipe = Recipe.none
    engine: QuantEngine = QuantEngine.emulated
    experts: ExpertFormat | None = None
    shared_experts: bool | None = None
    attention: bool | None = None
    mtp: bool | None = None
    activations: bool | None = None
    gradients: bool | None = None
    kv: bool | None = None
    indexer: bool | None = None
    stored: bool | None = None

    def parts(self) -> Parts:
        """What is quantised once the recipe and its exceptions are put together."""
        recipe = _RECIPES[Recipe(self.recipe)]
        chosen = {
            f.name: getattr(recipe, f.name)
            if getattr(self, f.name) is None
            else getattr(self, f.name)
            for f in fields(Parts)
        }
        chosen["experts"] = ExpertFormat(chosen["experts"])
        return Parts(**chosen)

    @property
    def active(self) -> bool:
        """Whether anything is quantised."""
        return self.parts() != Parts()

    def validate(self, prefix: str = "quant") -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: names the keys in conflict and their values.
        """
        refuse(ConfigError, self._problems(prefix))

    def _problems(self, prefix: str) -> Iterator[str]:
        parts = self.parts()
        linears = parts.shared_experts or parts.attention or parts.mtp
        linears = linears or parts.experts is not ExpertFormat.none
        for key in ("activations", "gradients"):
            if getattr(parts, key) and not linears:
                yield (
                    f"{prefix}.{key}=true acts on linears with quantised weights, but"
                    f" {prefix}.experts={parts.experts.value}, shared_experts=false,"
                    " attention=false and mtp=false"
                )
        if parts.gradients and not parts.activations:
            yield (
                f"{prefix}.gradients=true needs {prefix}.activations=true (now false): the"
                " weight gradient reads the FP8 activations"
            )
        if self.engine == QuantEngine.transformer_engine and not parts.gradients:
            yield (
                f"{prefix}.engine={QuantEngine.transformer_engine.value} runs forward and backward"
                f" in FP8, but {prefix}.gradients=false"
            )
