"""The quant section: recipes, overrides, YAML files, and what it refuses."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from quant.config import ExpertFormat, Parts, QuantConfig, QuantEngine, Recipe

CONF = Path(__file__).parents[2] / "conf" / "quant"


@pytest.mark.parametrize("recipe", list(Recipe))
def test_every_recipe_has_a_yaml_that_composes_and_is_valid(recipe):
    values = OmegaConf.load(CONF / f"{recipe.value}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantConfig), values))
    assert isinstance(config, QuantConfig)
    config.validate()
    assert config == QuantConfig(recipe=recipe)
    assert config.active == (recipe is not Recipe.none)


def test_a_part_overrides_its_recipe():
    parts = QuantConfig(recipe=Recipe.fp4_qat, kv=False, shared_experts=True).parts()
    assert parts == Parts(experts=ExpertFormat.fp4, indexer=True, shared_experts=True)
    assert QuantConfig(experts=ExpertFormat.fp8).active


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(activations=True), "quant.activations=true acts on linears"),
        (QuantConfig(attention=True, gradients=True), "needs quant.activations=true"),
        (
            QuantConfig(recipe=Recipe.fp4_qat, engine=QuantEngine.transformer_engine),
            "quant.gradients=false",
        ),
    ],
)
def test_what_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        config.validate()
