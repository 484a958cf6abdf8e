"""Datasets of the hub by name: away they are refused in one line that leads on, copies are read.

The folders are laid out as the hub does (``hub_doubles.py``) and read by the same library.
"""

from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from data import network
from data.config import DataConfig
from data.errors import ConfigError
from data.loader import build_loader
from data.prepare import build_tokenizer
from data.sources import DocumentStream
from tests.data.hub_doubles import codeparrot, fineweb_edu
from train.config.command_line import compose_run

TEXTS = [f"text {i} " + " ".join(f"w{i}x{j}" for j in range(5 + i)) for i in range(60)]
NAMES = {"fineweb_edu": fineweb_edu, "codeparrot": codeparrot}


def source_of(name, path=None):
    """The source as the YAML of its name gives it."""
    source = compose_run([f"data={name}"]).data.sources[name]
    source.path = str(path or source.path)
    return source


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_one_line_tells_what_leads_on(name, offline, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(network, "unreachable", lambda url: f"{url} does not answer")
    source = source_of(name)
    with pytest.raises(ConfigError) as caught:
        DocumentStream(name, source)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"data.sources.{name}.path={source.path} cannot be read as hub: ")
    assert ("does not answer, and its cache has no such data" in line) != offline
    subset = f" --subset {source.subset}" if source.subset else ""
    column = " --text-key content" if name == "codeparrot" else ""
    assert f"v4 prepare {source.path}{subset}{column} --out STORE" in line
    assert f"give data.sources.{name}.path=FOLDER" in line


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_as_the_hub_lays_it_out_is_read_and_goes_on_from_a_state(name, tmp_path):
    """The copy of FineWeb-Edu is a part: the files of its first subset are not there."""
    source = source_of(name, NAMES[name](tmp_path / "copy", TEXTS))
    stream = DocumentStream(name, source)
    first = stream.read(0, 40)
    position, state = stream.state()
    rest = stream.read(40, 100)
    assert first + rest == TEXTS[::2] + TEXTS[1::2]  # file after file
    other = DocumentStream(name, source)
    other.seek(position, state)
    assert other.read(40, 100) == rest
    source.streaming = False
    cfg = DataConfig("byte", sources={name: source}, cache_dir=str(tmp_path / "cache"))
    cfg.validation.bytes = 500
    cfg.validate()  # stated_tokens is no lost wish: now they are counted
    assert build_loader(cfg, build_tokenizer(cfg), 0, 2).source_tokens[name]


def test_a_copy_without_its_card_says_what_to_give(tmp_path):
    copy = fineweb_edu(tmp_path / "copy", TEXTS)
    source = source_of("fineweb_edu", copy / "sample" / "10BT")
    with pytest.raises(ConfigError, match=r"subset=sample-10BT is none of those .* README\.md"):
        DocumentStream("s", source)
    source.subset = ""
    assert len(DocumentStream("s", source).read(0, 100)) == len(TEXTS)
    source = source_of("fineweb_edu", copy)
    source.subset = "sample-1BT"
    with pytest.raises(ConfigError, match=r"names \(default, sample-10BT, sample-100BT\)"):
        DocumentStream("s", source)


# ---- answers of servers --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("response", "told"),
    [
        ({"status_code": 404, "reason_phrase": "Not Found", "url": "U"}, "404 Not Found for U"),
        ({"status_code": 403, "reason": "Forbidden", "url": "U"}, "403 Forbidden for U"),
        ({"status_code": 503}, "503"),
        ({"status": 404}, "no such key"),
        ({"status_code": None}, "no such key"),
    ],
)
def test_reason_is_a_servers_whatever_library_asked(response, told):
    """As httpx answers, as requests does, and others, whose answer the error's own words tell."""
    below = OSError("no such key")
    below.response = SimpleNamespace(**response)  # pyright: ignore[reportAttributeAccessIssue]
    error = ValueError("cannot be read")
    error.__cause__ = below
    assert network.reason_of(error) == told


def test_reason_is_the_errors_where_its_answer_is_a_dictionary():
    error = OSError("an error occurred (404)")
    error.response = {"Error": {"Code": "404"}}  # pyright: ignore[reportAttributeAccessIssue]
    assert network.reason_of(error) == "an error occurred (404)"


def test_an_answer_is_kept_for_its_named_arguments_too():
    question = network.Remembered(lambda hub, kind="set": f"{hub} {kind}")
    answers = [question("h", kind=kind) for kind in ("set", "model", "set")]
    assert answers == ["h set", "h model", "h set"]
    assert question.asked == 2
