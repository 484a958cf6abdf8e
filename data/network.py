"""Whether a server answers, asked before a library tries for minutes."""

from __future__ import annotations

import logging
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

SECONDS = 5.0  # of waiting for a connection
logger = logging.getLogger(__name__)
_PORTS = {"http": 80, "https": 443}


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


def go_offline_if_away() -> str:
    """Why the hub cannot be asked; the libraries then look into their cache, and do not try on."""
    if constants.HF_HUB_OFFLINE:
        return ""
    away = unreachable(constants.ENDPOINT)
    if away:
        logger.warning("data: %s: only its cache is read", away)
        constants.HF_HUB_OFFLINE = True
        if (library := sys.modules.get("datasets")) is not None:
            library.config.HF_HUB_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue]
    return away
