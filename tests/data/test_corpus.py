"""The embedded corpus: what is taken from a source file, and the default corpus as a whole."""

import json
import lzma

import pytest

from data.config import DataConfig, SourceConfig
from data.corpus import embedded_documents, module_text, package_key
from data.loader import build_loader
from data.prepare import build_tokenizer

LONG = "A sentence that is long enough to be taken as text, since short ones are left out. " * 3


@pytest.mark.core
def test_module_text_takes_long_strings_that_begin_a_line():
    source = f'''
"""{LONG}one

    indented
"""
import x
TEMPLATE = """{LONG}two"""
def f():
    r\'\'\'{LONG}three \'\'\'
    """short"""
    call("""
{LONG}four""")
    """{LONG}one

        indented
    """
'''
    text = module_text(source, seen := set())
    assert text == f"{LONG}one\n\nindented\n\n{LONG}three\n"
    assert module_text(source, seen) == ""


@pytest.mark.core
def test_one_quote_inside_the_other_does_not_end_a_string():
    source = f"""'''{LONG} has \"\"\" inside'''\n\"\"\"{LONG} next\"\"\"\n"""
    text = module_text(source, set())
    assert 'has """ inside' in text
    assert "next" in text


@pytest.mark.core
def test_documents_are_whole_modules_of_the_named_packages(tmp_path):
    folder = embedded_documents(["json", "logging"], tmp_path)
    names = json.loads((folder / "names.json").read_text())
    assert "json.decoder" in names
    assert "logging.handlers" in names
    assert embedded_documents(["json", "logging"], tmp_path) == folder
    assert package_key(["json"]) != package_key(["json", "logging"])


@pytest.mark.core
@pytest.mark.parametrize("package", ["nowhere_installed", "../json", "sys"])
def test_a_package_that_cannot_be_is_named(tmp_path, package):
    with pytest.raises(ValueError, match=f"package {package}"):
        embedded_documents([package], tmp_path)


def test_the_default_corpus_is_what_the_main_job_needs():
    """1 MB of validation text that xz needs about 2 bits a byte for; rows nearly full.

    In the cache that runs use too: it is made once.
    """
    cfg = DataConfig()
    tokenizer = build_tokenizer(cfg)
    assert tokenizer.vocab_size == 4096
    loader = build_loader(cfg, tokenizer, 0, 2)
    scored = loader.validation_bytes(512)
    assert len(scored) >= 1_000_000
    bits_per_byte = 8 * len(lzma.compress(scored, preset=1)) / len(scored)
    assert 1.5 < bits_per_byte < 3.5
    assert loader.manifest["sources"]["embedded"]["tokens"] > 2_000_000
    planned = loader.plan(500, 512)
    assert planned.counts.tokens > 0.97 * 500 * 512
    longest = max(int(row.documents.lengths.max()) for row in planned.rows)
    assert longest > 10_000
    assert SourceConfig().packages == ["stdlib", "torch", "numpy"]
