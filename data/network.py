"""Whether a server answers, and how, asked before a library tries for minutes.

An answer is kept for a minute: the sources of a run and the jobs of a sweep share it, a notebook
that lives for days does not.
"""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from typing import Any, Generic, ParamSpec, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from huggingface_hub import constants, get_token

SECONDS = 5.0  # of waiting for a connection, and for an answer
_MOST = 1 << 16  # bytes of an answer that are read: whole a small one, of another its beginning
logger = logging.getLogger(__name__)
_PORTS = {"http": 80, "https": 443}
KEPT = 60.0  # seconds that an answer holds
_away: dict[str, tuple[float, str]] = {}  # by hub: since when and why it is not asked
P = ParamSpec("P")
T = TypeVar("T")


class Remembered(Generic[P, T]):
    """A question whose answer is kept for a minute.

    Args:
        ask: the question; its arguments can be hashed.

    Attributes:
        asked: how often it was.
    """

    def __init__(self, ask: Callable[P, T]) -> None:
        self._ask = ask
        self._known: dict[Any, tuple[float, T]] = {}
        self.asked = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer."""
        key = (args, *sorted(kwargs.items()))
        known = self._known.get(key)
        if known is None or time.monotonic() - known[0] >= KEPT:
            self.asked += 1
            answer = self._ask(*args, **kwargs)
            known = self._known[key] = (time.monotonic(), answer)
        return known[1]

    def forget(self) -> None:
        """Know nothing."""
        self._known.clear()
        self.asked = 0


def unreachable(url: str, seconds: float = SECONDS) -> str:
    """Why nothing listens at an address; empty: something does, or a proxy that asks for us.

    Args:
        url: of the server.
        seconds: of waiting at most.
    """
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    try:
        port = parts.port or _PORTS.get(parts.scheme, 443)
        with socket.create_connection((parts.hostname or "", port), timeout=seconds):
            return ""
    except (OSError, ValueError) as error:
        return f"{parts.scheme}://{parts.netloc} does not answer ({error})"


@dataclass(frozen=True)
class Answer:
    """What a server says to one request.

    Attributes:
        status: of HTTP; 0: there was no such answer.
        said: status and its name, or why there was none.
        body: of an answer without error; the beginning of a long one.
    """

    status: int
    said: str
    body: bytes = b""

    @property
    def record(self) -> dict[str, Any] | None:
        """The JSON object that it holds; None: it holds none."""
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) else None

    @property
    def begins_record(self) -> bool:
        """Whether it looks like a JSON object as far as it was read: a hub's may be of any size."""
        return self.body.lstrip().startswith(b"{")


def ask(
    url: str,
    headers: Mapping[str, str] | None = None,
    data: bytes | None = None,
    seconds: float = SECONDS,
) -> Answer | None:
    """One request, without a second try; None where only the library can tell (certificates).

    Args:
        url: http or https.
        headers: of the request.
        data: is sent by POST; None: GET.
        seconds: of waiting at most for a connection, and for the answer.
    """
    request = Request(url, data, dict(headers or {}))
    try:
        with urlopen(request, timeout=seconds) as answer:
            return Answer(answer.status, f"{answer.status} {answer.reason}", answer.read(_MOST))
    except HTTPError as error:
        with error:
            return Answer(error.code, f"{error.code} {error.reason}")
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            return None
        text = " ".join(str(reason).split())[:100]
        return Answer(0, text or type(reason).__name__)


@dataclass(frozen=True)
class HubAnswer:
    """Whether the hub gives a repository.

    Attributes:
        away: why the hub cannot be asked at all; the libraries then look into their cache, and do
            not try on.
        refused: why it does not give this one, and what to do.
    """

    away: str = ""
    refused: str = ""


class _OneLineOfRetries(logging.Filter):
    """Of the library's lines about requests that it makes again, one a minute, in our words."""

    told = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        failed = re.match(r"(.+?) thrown while requesting \S+ (\S+)", text)
        if failed and time.monotonic() - self.told >= KEPT:
            self.told = time.monotonic()
            logger.warning(
                "data: %s from %s: it is asked again, up to half a minute", *failed.groups()
            )
        return not failed and not text.startswith("Retrying in")


_RETRIES = _OneLineOfRetries()


def reason_of(error: BaseException) -> str:
    """What a library's error comes from: the server's own answer, if there was one below it."""
    below: BaseException | None = error
    while below is not None:
        answer = getattr(below, "response", None)  # of httpx, requests or another library
        status = getattr(answer, "status_code", None)
        if isinstance(status, int) and status >= HTTPStatus.BAD_REQUEST:
            name = getattr(answer, "reason_phrase", None) or getattr(answer, "reason", None)
            url = getattr(answer, "url", None)
            words = (str(status), name, url and f"for {url}")
            return " ".join(word for word in words if word)
        below = below.__cause__ or below.__context__
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[:300] or type(cause).__name__


def ask_hub(kind: str, name: str) -> HubAnswer:
    """Ask the hub for a repository; none that was away less than a minute ago.

    Args:
        kind: dataset or model.
        name: OWNER/NAME.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    logging.getLogger("huggingface_hub.utils._http").addFilter(_RETRIES)  # once: it is one object
    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        since, why = _away.get(hub, (math.inf, ""))  # none: it is the user's own wish
        if time.monotonic() - since < KEPT:
            return HubAnswer(why)
        del _away[hub]
        _look_only_into_caches(False)
    return _answer_of_hub(hub, kind, name)


def go_offline(away: str) -> None:
    """Let the libraries look into their cache alone for now; a line says why, once."""
    if not constants.HF_HUB_OFFLINE:
        logger.warning("data: %s: only its cache is read from now on", away)
        _away[constants.ENDPOINT] = (time.monotonic(), away)
    _look_only_into_caches(True)


def _look_only_into_caches(only: bool) -> None:
    constants.HF_HUB_OFFLINE = only
    if (library := sys.modules.get("datasets")) is not None:
        library.config.HF_HUB_OFFLINE = only  # pyright: ignore[reportAttributeAccessIssue]


@Remembered
def _answer_of_hub(hub: str, kind: str, name: str) -> HubAnswer:
    if away := unreachable(hub):
        return HubAnswer(away)
    token = get_token()
    answer = ask(
        f"{hub}/api/{kind}s/{quote(name)}", {"Authorization": f"Bearer {token}"} if token else {}
    )
    if answer is None:
        return HubAnswer()
    if answer.status == HTTPStatus.NOT_FOUND:
        return HubAnswer(refused=f"{hub} has no such {kind} ({answer.said})")
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        given = "the token that was sent does not open it" if token else "no token was sent"
        return HubAnswer(
            refused=f"{hub} says {answer.said}: there is no such {kind}, or it is private or gated,"
            f" and {given}; hf auth login, or the environment variable HF_TOKEN, gives one, and its"
            " page the access"
        )
    if answer.status != HTTPStatus.OK:
        return HubAnswer(f"{hub} does not answer as a hub ({answer.said})")
    if not answer.begins_record:
        return HubAnswer(f"{hub} does not answer as a hub (no JSON record)")
    return HubAnswer()
