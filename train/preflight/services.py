"""Services that a run asks for: whether they can be had is known in seconds."""

from __future__ import annotations

import netrc
from urllib.parse import urlsplit

from data.network import unreachable
from parallel.launch import launched_rank
from train.config.schema import RunConfig, WandbMode
from train.errors import UserError


def check_services(run: RunConfig) -> None:
    """Refuse Weights & Biases online without its server or a key; rank 0 alone asks.

    Raises:
        UserError: names the key, the address and what to do.
    """
    if run.wandb.mode is not WandbMode.online or run.train.eval_only or launched_rank():
        return
    import wandb  # noqa: PLC0415  a second to import, and most runs never use it

    settings = wandb.setup().settings
    offline = "wandb.mode=offline keeps all for a later wandb sync"
    if not settings.api_key and not _in_netrc(settings.base_url):
        raise UserError(
            f"wandb.mode=online: there is no key for {settings.base_url}; wandb login, or the"
            f" environment variable WANDB_API_KEY, gives one; {offline}"
        )
    if reason := unreachable(settings.base_url):
        raise UserError(f"wandb.mode=online: {reason}; {offline}")


def _in_netrc(url: str) -> bool:
    try:
        return netrc.netrc().authenticators(urlsplit(url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
