"""The command line before Hydra reads it: groups, keys and flags, checked with nearest match.

Hydra takes ``+model=x`` only for groups that do not stand in the defaults list and ``model=x`` only
for those that do; here both work, since the ``+`` is taken off. ``+foo=1`` would add a key
silently, a misspelt option of an optional group would be dropped silently; both are refused here,
and everything else is left to Hydra's own composition.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.files import kind_of
from train.config.aliases import meant_by_flag, meant_by_key
from train.config.load import load, unknown_key
from train.config.schema import RunConfig
from train.errors import ROOT, USER_ERRORS, UserError, check_all

CONF = ROOT / "conf"
_FLAGS = get_args_parser()._option_string_actions  # each flag with what Hydra does with it
_FOREIGN = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


def groups(conf: Path = CONF) -> list[str]:
    """Groups that stand in the defaults list of ``conf/config.yaml``."""
    config = yaml.safe_load((conf / "config.yaml").read_text())
    entries = [entry for entry in config["defaults"] if isinstance(entry, dict)]
    keys = [str(key).split() for entry in entries for key in entry]
    return [key[-1] for key in keys if key[0] != "override"]


def options(group: str, conf: Path = CONF) -> list[str]:
    """Options of a group: its files without their suffix."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def normalise(args: Sequence[str], conf: Path = CONF) -> list[str]:
    """Check arguments and return them as Hydra wants them: flags first, groups without ``+``.

    Args:
        args: the command line without the program.
        conf: folder of the groups.

    Raises:
        UserError: an unknown flag, group option or key; names the nearest match.
    """
    known = groups(conf)
    plus = re.compile(rf"^\++(?=({'|'.join(known)})=)")
    cleaned = [plus.sub("", arg) for arg in args]
    flags, overrides = _split(cleaned)
    own_conf = not any(flag.split("=")[0] in _FOREIGN for flag in flags)
    given = conf if own_conf else None
    check_all(*(partial(_check_override, arg, known, given) for arg in overrides))
    gathered = _gather_items(overrides, sweeps(flags))
    return [*flags, *gathered, *(sweep_folder(gathered) if sweeps(flags) else ())]


def acceptable(args: Sequence[str]) -> list[str]:
    """The keys and options that :func:`normalise` would take.

    Args:
        args: of which it refuses some.
    """
    good, known = [], groups()
    for arg in args:
        with suppress(*USER_ERRORS):
            if not arg.startswith("-"):
                _check_override(arg, known, CONF)
                good.append(arg)
    return good


def sweeps(args: Sequence[str]) -> bool:
    """Whether the command line asks for several jobs."""
    return "-m" in args or "--multirun" in args


def sweep_folder(overrides: Sequence[str]) -> list[str]:
    """The override by which a sweep lies in ``run_dir`` itself, where the command line names one.

    Args:
        overrides: without flags.
    """
    named = {o.key_or_group: o for o in parse(overrides)}
    if "hydra.sweep.dir" in named or "run_dir" not in named or named["run_dir"].is_sweep_override():
        return []
    return ["hydra.sweep.dir=${run_dir}"]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them.

    Args:
        overrides: as :func:`normalise` returned them; flags are passed over.
    """
    return OverridesParser.create().parse_overrides(_split(overrides)[1])


def compose_run(args: Sequence[str] = (), conf: Path = CONF) -> RunConfig:
    """The validated run that a command line describes, for scripts and tests.

    Args:
        args: groups and keys as on the command line, without flags.
        conf: folder of the groups.

    Raises:
        ValueError: as :func:`normalise` and :func:`train.config.load.load`.
    """
    return load(composed(args, conf))


def composed(args: Sequence[str] = (), conf: Path = CONF) -> DictConfig:
    """The config of a command line as Hydra composes it; arguments as of :func:`compose_run`."""
    with initialize_config_dir(str(conf), version_base=None):
        return compose("config", normalise(args, conf))


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides; Hydra itself takes overrides only in one block."""
    flags: list[str] = []
    overrides: list[str] = []
    awaits_value = False
    for arg in args:
        if arg.startswith("-"):
            flag = arg.split("=")[0]
            if flag not in _FLAGS:
                meant = meant_by_flag(flag)
                hint = f"give {meant}" if meant else _hint(flag, list(_FLAGS), "see --help")
                raise UserError(f"unknown flag {flag}: {hint}")
            flags.append("--info=all" if arg in ("--info", "-i") else arg)
            awaits_value = "=" not in arg and _FLAGS[flag].nargs is None
        elif awaits_value:
            flags.append(arg)
            awaits_value = False
        else:
            overrides.append(arg)
    return flags, overrides


def _gather_items(overrides: Sequence[str], sweep: bool) -> list[str]:
    """Join keys of named items (``data.sources.NAME.KEY=...``) into one override of their dict.

    Hydra cannot add an item by one of its keys. As a whole (``++data.sources={NAME:{KEY:...}}``)
    items are added, or merged into those that are there. Where keys are swept the dict is.
    """
    out: list[str] = []
    items: dict[str, dict[str, list[list[str]]]] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        parts = key.split(".")
        depth = _item_depth(parts)
        if override.startswith("~") or depth is None or not depth <= len(parts) <= depth + 1:
            out.append(override)
            continue
        keys = items.setdefault(".".join(parts[: depth - 1]), {}).setdefault(parts[depth - 1], [])
        if len(parts) > depth:
            keys.append([f"{parts[-1]}:{choice}" for choice in _choices(override, value, sweep)])
        else:
            keys.append([value.strip().removeprefix("{").removesuffix("}")])
    for path, named in items.items():
        dicts = []
        for chosen in itertools.product(*(itertools.product(*keys) for keys in named.values())):
            inner = (f"{name}:{{{','.join(k)}}}" for name, k in zip(named, chosen, strict=True))
            dicts.append(f"{{{','.join(inner)}}}")
        out.append(f"++{path}={','.join(dicts)}")  # the dict is closed to plain overrides
    return out


def _choices(override: str, value: str, sweep: bool) -> list[str]:
    """Values of an item's key, each as Hydra's grammar writes it; several under ``-m`` alone."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return [value]
    if not sweep:
        raise UserError(
            f"{override}: several values need -m; one value with a comma is quoted,"
            f" {override.partition('=')[0]}='\"{value}\"'"
        )
    return list(parsed.sweep_string_iterator())


def _item_depth(parts: Sequence[str]) -> int | None:
    """How many parts name an item of a dict of sections, if the key leads into one."""
    schema: Any = RunConfig
    for depth, part in enumerate(parts):
        if get_origin(schema) is dict:
            return depth + 1 if is_dataclass(get_args(schema)[1]) else None
        if not is_dataclass(schema):
            return None
        schema = get_type_hints(schema).get(part)
    return None


def _check_override(arg: str, known: Sequence[str], conf: Path | None) -> None:
    try:
        override = OverridesParser.create().parse_override(arg)
    except HydraException as error:
        near = [group for group in known if conf and arg in options(group, conf)]
        hint = f"did you mean {near[0]}={arg}?" if near else "give GROUP=OPTION or KEY=VALUE"
        if not near and (good := _quoted(arg)):
            hint = f"such a text is quoted, for the shell and in it: {good}"
        raise UserError(f"cannot read the argument {arg!r}: {hint}") from error
    key = override.key_or_group
    found = override.value()
    if isinstance(found, int | float) and str(found) != arg.partition("=")[2]:
        if good := _quoted(arg):
            raise UserError(f"{arg} would be read as {found}: a text is quoted, {good}")
    if key.split(".")[0].split("/")[0] == "hydra":
        return
    if key in known:
        if conf is not None:
            _check_option(key, arg.partition("=")[2], conf)
        return
    problem = unknown_key(key.split("."), RunConfig, known)
    meant = meant_by_key(key)
    section = _annotation(key)
    if isinstance(found, str | int | float) and is_dataclass(section):
        own = ", ".join(f"{key}.{part.name}" for part in fields(section))
        raise UserError(f"{arg}: {key} is a section; give {meant or own}")
    if problem is not None and meant:
        problem = f"give {meant}"
    if problem is not None:
        raise UserError(f"unknown config key {arg.lstrip('+~')}: {problem}")
    _check_type(arg, key, override)


def _annotation(key: str) -> Any:
    """Type of a key of sections; None where there is none."""
    schema: Any = RunConfig
    for part in key.split("."):
        if not is_dataclass(schema):
            return None
        schema = get_type_hints(schema).get(part)
    return schema


def _check_type(arg: str, key: str, override: Override) -> None:
    """Refuse a value that its key cannot take; keys of named items are composed first."""
    if override.is_delete() or override.is_sweep_override() or _item_depth(key.split(".")):
        return
    if not set(key).isdisjoint("@/"):
        return
    try:
        OmegaConf.update(_schema(), key, override.value())
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        if "interpolation" not in text.lower():
            raise UserError(f"{arg}: {text}") from error


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)


def _quoted(arg: str) -> str | None:
    """The argument as one types it where its value is a text; None where its key holds none."""
    key, _, value = arg.partition("=")
    if not _holds_text(key.lstrip("+").split(".")):
        return None
    for mark in ('"', "'"):
        typed = f"{key}={mark}{value.replace(mark, chr(92) + mark)}{mark}"
        try:
            if OverridesParser.create().parse_override(typed).value() == value:
                return shlex.quote(typed)
        except HydraException:
            continue
    return None


def _holds_text(parts: Sequence[str]) -> bool:
    """Whether a key of the config is a text, as paths and prompts are."""
    schema: Any = RunConfig
    for part in parts:
        if get_origin(schema) is dict:
            schema = get_args(schema)[1]
        elif is_dataclass(schema):
            schema = get_type_hints(schema).get(part)
        else:
            return False
    return schema is str or str in get_args(schema)


def _check_option(group: str, value: str, conf: Path) -> None:
    """Every option named in a plain or comma-separated value must be a file of the group."""
    if meant := _path_for_option(group, value, conf):
        raise UserError(f"{group}={value}: conf/{group} has no such file; give {meant}")
    if not re.fullmatch(r"[\w.,\- ]*", value) or value == "null":
        return  # a Hydra function such as glob(...); composition will judge
    have = options(group, conf)
    for option in (part.strip() for part in value.split(",")):
        if option not in have:
            raise UserError(
                f"{group}={option}: conf/{group} has no such file; {_hint(option, have)}"
            )


def _path_for_option(group: str, value: str, conf: Path) -> str | None:
    """What is meant where a path or a hub name stands for the option of a group."""
    if value in options(group, conf) or not re.fullmatch(r"[\w.\-/~ ]+", value):
        return None
    path = Path(value).expanduser()
    found = path.exists() or "/" in value
    if not found:
        return None
    if group == "data":
        return _data_of(path, value)
    if group in ("model", "train") and path.exists():
        return f"init_from={value} (a run or a checkpoint) and model=NAME of its size"
    if group == "model":
        return (
            f"v4 import_hf FOLDER runs/imported, then init_from=runs/imported ({value} is no size)"
        )
    return None


def _data_of(path: Path, value: str) -> str:
    kind = kind_of(path).value
    return f"data={kind} data.sources.{kind}.path={value}"


def _hint(word: str, known: Sequence[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise or f"there are: {', '.join(known)}"
