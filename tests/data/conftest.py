"""Small real data for the tests: a few packages of the standard library, one byte a token."""

from pathlib import Path

import pytest

from data.config import DataConfig, FimConfig, PackingConfig, SourceConfig, ValidationConfig
from data.loader import Loader, build_loader
from data.prepare import build_tokenizer

PACKAGES = ["json", "logging", "asyncio", "http"]


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_config(data_cache: Path) -> DataConfig:
    """Some 40 documents, most longer than a test's rows."""
    return DataConfig(
        tokenizer="byte",
        cache_dir=str(data_cache),
        sources={"docs": SourceConfig(packages=list(PACKAGES))},
        packing=PackingConfig(pool_documents=8),
        validation=ValidationConfig(bytes=12_000),
        fim=FimConfig(rate=0.0),
    )


@pytest.fixture
def make_loader(small_config: DataConfig):
    """A loader of the small data; changes to the config as keyword arguments."""

    def make(seed: int = 0, depths: int = 2, fim: float = 0.0) -> Loader:
        small_config.fim.rate = fim
        return build_loader(small_config, build_tokenizer(small_config), seed, depths)

    return make
