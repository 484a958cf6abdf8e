"""The data section: OmegaConf accepts it, every YAML of conf/data fits it, bad values are named."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.config import (
    DataConfig,
    FimConfig,
    OnBadLine,
    PackingConfig,
    SourceConfig,
    SourceKind,
    TextUnit,
    ValidationConfig,
)

pytestmark = pytest.mark.core

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
NEEDS_PATH = {"text": "text", "jsonl": "jsonl", "parquet": "parquet", "hub": "hub",
              "store": "store", "mixture": "store"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_yaml_is_a_valid_section(name):
    overrides = [f"sources.{NEEDS_PATH[name]}.path=/x"] if name in NEEDS_PATH else []
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose(name, overrides)
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), composed))
    assert isinstance(cfg, DataConfig)
    cfg.validate()
    kinds = {source.kind.value for source in cfg.named_sources().values()}
    assert kinds == {"default": {"embedded"}, "bytes": {"embedded"},
                     "mixture": {"store", "embedded"}, "recall": {"synthetic"},
                     "codeparrot": {"hub"}, "fineweb_edu": {"hub"}, "web_and_code": {"hub"},
                     "long_range": {"package_sources", "synthetic"}}.get(name, {name})  # fmt: skip


def test_the_default_section_is_the_default_yaml():
    yaml = OmegaConf.load(CONF / "default.yaml")
    assert OmegaConf.merge(OmegaConf.structured(DataConfig), yaml) == DataConfig()


def text(**fields) -> SourceConfig:
    return SourceConfig(kind=SourceKind.text, path="x", **fields)


BAD = [
    ({"tokenizer": " "}, r"data\.tokenizer=''"),
    ({"vocab_size": 100}, r"data\.vocab_size=100 must be 512 or more"),
    ({"workers": 0}, r"data\.workers=0 must lie in \[1, 1024\]"),
    ({"cache_dir": ""}, r"data\.cache_dir=''"),
    ({"fim": FimConfig(rate=1.5)}, r"data\.fim\.rate=1\.5 must lie in \[0, 1\]"),
    ({"packing": PackingConfig(0)}, r"data\.packing\.pool_documents=0"),
    ({"validation": ValidationConfig(bytes=-1)}, r"data\.validation\.bytes=-1"),
    ({"validation": ValidationConfig(max_overlap=2)}, r"data\.validation\.max_overlap=2"),
    ({"validation": ValidationConfig(ngram=0)}, r"data\.validation\.ngram=0"),
    ({"sources": {"a": SourceConfig(path="x")}}, r"a\.path=x has no effect: .*a\.kind=embedded"),
    ({"sources": {"a": SourceConfig(packages=[])}}, r"a\.packages=\[\]"),
    ({"sources": {"a": SourceConfig(SourceKind.text)}}, r"a\.path='' .*a\.kind=text"),
    ({"sources": {"../a": text()}}, r"cannot name a source"),
    ({"sources": {"a": SourceConfig(streaming=True)}}, r"a\.streaming=true .*kind=embedded"),
    ({"sources": {"a": text(text_key="t")}}, r"a\.text_key=t has no effect: .*a\.kind=text"),
    ({"sources": {"a": SourceConfig(SourceKind.hub, "x", text_key="")}}, r"a\.text_key=''"),
    (
        {"sources": {"a": SourceConfig(SourceKind.jsonl, "x", unit=TextUnit.paragraph)}},
        r"a\.unit=paragraph has no effect: .*a\.kind=jsonl",
    ),
    (
        {"sources": {"a": SourceConfig(SourceKind.hub, "x", on_bad_line=OnBadLine.skip)}},
        r"a\.on_bad_line=skip has no effect: .*a\.kind=hub",
    ),
    ({"sources": {"a": text(split="dev")}}, r"a\.split=dev has no effect: .*a\.kind=text"),
    ({"sources": {"a": text(weight=0.5), "b": text(weight=0.6)}}, r"weights sum to 1\.1"),
    (
        {"sources": {"a": text(weight=-1.0), "b": text(weight=2.0)}},
        r"a\.weight=-1\.0 must lie in \(0, 1\]",
    ),
    ({"sources": {"a": text(weight=float("nan"))}}, r"a\.weight=nan must be"),
    ({"sources": {"a": text(weight=1.0), "b": text()}}, r"b\.weight=null but .*a\.weight=1\.0"),
    ({"sources": {"a": text(streaming=True), "b": text()}}, r"a\.streaming=true needs .*a\.weight"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_a_value_that_cannot_be_is_named(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        DataConfig(**fields).validate()
    assert "\n" not in str(caught.value)
