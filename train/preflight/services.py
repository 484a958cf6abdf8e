"""Services that a run asks for: whether they can be had is known in seconds."""

from __future__ import annotations

import base64
import netrc
from http import HTTPStatus
from urllib.parse import urlsplit

from data.network import Remembered, ask, unreachable
from parallel.launch import launched_rank
from train.config.schema import RunConfig, WandbMode
from train.errors import UserError

_WHO = b'{"query": "query { viewer { id } }"}'  # the smallest question that needs the key


def check_services(run: RunConfig) -> None:
    """Refuse Weights & Biases online without its server or a key; rank 0 alone asks.

    Raises:
        UserError: names the key, the address and what to do.
    """
    if run.wandb.mode is not WandbMode.online or run.train.eval_only or launched_rank():
        return
    import wandb  # noqa: PLC0415  a second to import, and most runs never use it

    settings = wandb.setup().settings
    key = settings.api_key or _in_netrc(settings.base_url)
    offline = "wandb.mode=offline keeps all for a later wandb sync"
    if not key:
        raise UserError(
            f"wandb.mode=online: there is no key for {settings.base_url}; wandb login, or the"
            f" environment variable WANDB_API_KEY, gives one; {offline}"
        )
    if reason := _refusal(settings.base_url, key):
        raise UserError(f"wandb.mode=online: {reason}; {offline}")


@Remembered
def _refusal(url: str, key: str) -> str:
    """Why the server does not take a key; empty: it does, or only the library can tell."""
    if reason := unreachable(url):
        return reason
    coded = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {coded}", "Content-Type": "application/json"}
    answer = ask(f"{url.rstrip('/')}/graphql", headers, _WHO)
    if answer is None:
        return ""
    if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return f"{url} does not take the key ({answer.said}); wandb login --relogin gives another"
    if answer.status != HTTPStatus.OK:
        return f"{url} does not answer as Weights & Biases does ({answer.said})"
    data = (answer.record or {}).get("data")
    if not isinstance(data, dict):
        return f"{url} does not answer as Weights & Biases does (no record)"
    return "" if data.get("viewer") else f"{url} knows no account of the key"


def _in_netrc(url: str) -> str:
    """The key that netrc has for a server; empty: none."""
    try:
        known = netrc.netrc().authenticators(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return ""
    return known[2] if known else ""
