"""Services that are away cost seconds and one line: a port nobody listens at is their double."""

import http.server
import json
import logging
import math
import re
import socket
import struct
import threading
from contextlib import contextmanager

import datasets
import huggingface_hub.utils._http
import pytest

from data import network
from data.network import unreachable
from data.tokenizer import load_tokenizer
from scripts import prepare
from train.config.command_line import compose_run
from train.errors import USER_ERRORS
from train.preflight import services
from train.preflight.services import check_services
from train.pretrain import cli

SAYS = {  # how a server fails, and what is told of it
    "500": "does not answer as .*500 Internal Server Error",
    "401": "401 Unauthorized.*(HF_TOKEN|wandb login)",
    "403": "403 Forbidden.*(HF_TOKEN|wandb login)",
    "404": "404 Not Found",
    "slow": "does not answer as .*timed out",
    "reset": "does not answer as .*(reset|closed)",
    "garbage": "does not answer as ",
    "no JSON": "does not answer as .*no (JSON )?record",
}
JSON = b'{"siblings": [' + b", ".join([b"{}"] * 1_000) + b"]}"  # of many files
AWAY = "http://127.0.0.1:9"  # the discard service, which nothing runs


@pytest.fixture(autouse=True)
def _nothing_asked_yet():
    """Ports are used again: no answer of another test's server may be remembered."""
    network._answer_of_hub.forget()
    services._refusal.forget()
    network._away.clear()


@pytest.fixture
def server():
    with serving(http.server.BaseHTTPRequestHandler) as made:
        yield made.url


class _Fails(http.server.BaseHTTPRequestHandler):
    """Every request fails in the way that the server's ``how`` names."""

    def do_GET(self):
        how = self.server.how
        if how == "slow":
            self.server.ended.wait(20)
        elif how == "reset":  # an RST, as lingering for 0 s gives
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif how == "garbage":
            self.wfile.write(b"SSH-2.0-nothing\r\n")
        elif how == "no JSON":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")
        else:
            self.send_error(int(how))
        self.close_connection = True

    do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


class _Answers(http.server.BaseHTTPRequestHandler):
    """Every request gets a long record."""

    def do_GET(self):
        self.server.requests.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(JSON)

    do_POST = do_GET

    def log_message(self, *_):
        pass


class _FailsLater(http.server.BaseHTTPRequestHandler):
    """A hub with a dataset and a model of one file each, which it does not give."""

    def do_GET(self):
        file = {"type": "file", "path": "x.jsonl", "size": 9, "oid": "b" * 40}
        status, said = 200, {"id": "no/where", "sha": "a" * 40, "private": False, "tags": [],
                             "siblings": [{"rfilename": "x.jsonl"}]}  # fmt: skip
        if "/tree/" in self.path:
            said = [file]
        elif not self.path.startswith("/api/"):
            status = 500 if self.path.endswith(("x.jsonl", "tokenizer.json")) else 404
        body = json.dumps(said).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A connection that was closed under the handler."""


@contextmanager
def serving(handler, **given):
    """A server until the end of the block."""
    made = _Server(("127.0.0.1", 0), handler)
    vars(made).update(given)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.fixture(params=list(SAYS))
def failing(request, no_proxy, monkeypatch):
    """A server that fails, and what is to be told of it."""
    # One that never answers is left soon; of another no load may make such a one.
    seconds = 0.2 if request.param == "slow" else 60.0
    monkeypatch.setattr(network.ask, "__defaults__", (None, None, seconds))
    ended = threading.Event()
    with serving(_Fails, how=request.param, ended=ended) as made:
        yield made.url, SAYS[request.param]
        ended.set()


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
    run = compose_run(["model=v4_tiny", "wandb.mode=online"])
    with pytest.raises(USER_ERRORS, match=f"wandb.mode=online: .*{says}.*wandb.mode=offline"):
        check_services(run)
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
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert cli(["model=v4_tiny", *words, "train.device=cpu", f"run_dir={tmp_path}/run",
                f"data.cache_dir={tmp_path}/cache"]) == 2  # fmt: skip
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "no/where" in lines[0]


@pytest.mark.parametrize("asked", ["data", "tokenizer", "prepare"])
def test_a_hub_that_fails_is_one_line_at_once(asked, failing, monkeypatch, capsys, tmp_path):
    url, says = failing
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network.constants, "ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    if asked == "prepare":
        assert prepare.main(["no/where"]) == 2
    else:
        words = {"data": ["data=hub", "data.sources.hub.path=no/where"],
                 "tokenizer": ["data.tokenizer=no/where"]}[asked]  # fmt: skip
        assert cli(["model=v4_tiny", *words, "train.device=cpu", "run_dir=run"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "no/where" in line
    assert re.search(says, line)


@pytest.mark.parametrize("asked", ["data", "tokenizer"])
def test_a_hub_that_fails_at_a_later_file_is_told_by_its_own_answer(
    asked, no_proxy, monkeypatch, capsys, caplog, tmp_path
):
    """It knows the repository and lists its file, but answers 500 to whoever asks for that."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    network._RETRIES.told = -math.inf
    words = {"data": ["data=hub", "data.sources.hub.path=no/where"],
             "tokenizer": ["data.tokenizer=no/where"]}[asked]  # fmt: skip
    with serving(_FailsLater) as made:
        monkeypatch.setattr(network.constants, "ENDPOINT", made.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", made.url)
        addresses = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(network.constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
        code = cli(["model=v4_tiny", *words, "train.device=cpu", f"run_dir={tmp_path}/run",
                    f"data.cache_dir={tmp_path}/cache"])  # fmt: skip
    told = capsys.readouterr().err
    assert code == 2
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert re.search(r"no/where.*500 Internal Server Error for http://127.0.0.1", line)
    assert "Retrying" not in told + caplog.text
    assert "HTTP Request" not in told + caplog.text
    if asked == "data":  # the library asks for a file of rows again
        assert caplog.text.count("it is asked again") == 1
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_wandb_that_fails_is_one_line_at_once_and_leaves_nothing(
    failing, monkeypatch, capsys, tmp_path
):
    url, says = failing
    monkeypatch.chdir(tmp_path)
    settings = type("Settings", (), {"base_url": url, "api_key": "k" * 40})
    monkeypatch.setattr("wandb.setup", lambda: type("Setup", (), {"settings": settings}))
    assert cli(["model=v4_tiny", "train.device=cpu", "run_dir=run", "wandb.mode=online"]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(f"error: wandb.mode=online: .*{says}.*wandb.mode=offline .*\n", told)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_failed_is_not_asked_again_and_every_source_is_told_why(
    no_proxy, monkeypatch, caplog
):
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network.constants, "ENDPOINT", AWAY)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("a/b", "c/d"):
        says = f"data.tokenizer={name}: .*{re.escape(AWAY)} does not answer"
        with pytest.raises(USER_ERRORS, match=says):
            load_tokenizer(name)
    assert network._answer_of_hub.asked == 1
    assert sum("only its cache is read" in message for message in caplog.messages) == 1


def test_answers_are_kept_for_a_minute_and_not_for_the_life_of_the_process(
    no_proxy, monkeypatch, caplog
):
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    now = [1000.0]
    monkeypatch.setattr(network.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(network.constants, "ENDPOINT", AWAY)
    away = network.ask_hub("model", "a/b").away
    network.go_offline(away)
    assert datasets.config.HF_HUB_OFFLINE
    with serving(_Answers, requests=[]) as made:
        monkeypatch.setattr(network, "_away", {made.url: network._away[AWAY]})
        monkeypatch.setattr(network.constants, "ENDPOINT", made.url)
        for later, answer, asked in ((59, away, 0), (61, "", 1), (120, "", 1), (122, "", 2)):
            now[0] = 1000.0 + later
            assert network.ask_hub("model", "a/b") == network.HubAnswer(answer)
            assert len(made.requests) == asked
    assert not datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", True)  # as the user wishes
    now[0] += 1000
    assert network.ask_hub("model", "a/b") == network.HubAnswer("")
    assert network.constants.HF_HUB_OFFLINE


def test_a_long_record_is_a_record(no_proxy, monkeypatch):
    monkeypatch.setattr(network.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_MOST", 1_000)
    with serving(_Answers, requests=[]) as made:
        monkeypatch.setattr(network.constants, "ENDPOINT", made.url)
        assert network.ask_hub("dataset", "a/b") == network.HubAnswer()


def test_jobs_of_a_sweep_share_the_answer(no_proxy, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with serving(_Answers, requests=[]) as made:
        settings = type("Settings", (), {"base_url": made.url, "api_key": "k" * 40})
        monkeypatch.setattr("wandb.setup", lambda: type("Setup", (), {"settings": settings}))
        words = ["-m", "model=v4_tiny", "train.device=cpu", "wandb.mode=online", "seed=0,1,2"]
        assert cli([*words, "run_dir=study"]) == 2
        assert made.requests == ["/graphql"]
    assert capsys.readouterr().err.count("error:") == 1
