"""Services that are away cost seconds and one line: a port nobody listens at is their double."""

import http.server
import logging
import threading
import time

import pytest

from data import network
from data.network import unreachable
from train.config.command_line import compose_run
from train.errors import USER_ERRORS
from train.preflight.services import check_services
from train.pretrain import cli

AWAY = "http://127.0.0.1:9"  # the discard service, which nothing runs


@pytest.fixture
def server():
    made = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_an_address_answers_or_says_why_not(server, no_proxy):
    assert unreachable(server) == ""
    assert unreachable(AWAY).startswith("http://127.0.0.1:9 does not answer (")


def test_a_proxy_asks_for_us(server, no_proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    assert unreachable("http://nowhere.invalid") == ""


@pytest.mark.parametrize(("base", "says"), [("away", "does not answer"), ("here", "no key for")])
def test_wandb_without_server_or_key_is_one_line_at_once(
    base, says, server, no_proxy, monkeypatch, tmp_path
):
    url, key = (AWAY, "k" * 40) if base == "away" else (server, None)
    settings = type("Settings", (), {"base_url": url, "api_key": key})
    monkeypatch.setattr("wandb.setup", lambda: type("Setup", (), {"settings": settings}))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run, began = compose_run(["model=v4_tiny", "wandb.mode=online"]), time.monotonic()
    with pytest.raises(USER_ERRORS, match=f"wandb.mode=online: .*{says}.*wandb.mode=offline"):
        check_services(run)
    assert time.monotonic() - began < 10
    monkeypatch.setenv("RANK", "1")
    check_services(run)  # rank 0 alone asks


@pytest.mark.parametrize(
    "words",
    [
        ["data=hub", "data.sources.hub.path=no/where"],
        ["data=hub", "data.sources.hub.path=no/where", "data.sources.hub.streaming=true"],
        ["data.tokenizer=no/where"],
    ],
)
def test_a_hub_that_is_away_is_one_line_in_seconds(words, no_proxy, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network.constants, "ENDPOINT", AWAY)
    import datasets  # noqa: PLC0415

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    began = time.monotonic()
    assert cli(["model=v4_tiny", *words, "train.device=cpu", f"run_dir={tmp_path}/run",
                f"data.cache_dir={tmp_path}/cache"]) == 2  # fmt: skip
    assert time.monotonic() - began < 15
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "no/where" in lines[0]
