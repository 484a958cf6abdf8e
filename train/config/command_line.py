"""The command line before Hydra reads it: groups, keys and flags, checked with nearest match.

Hydra takes ``+model=x`` only for groups that do not stand in the defaults list and ``model=x`` only
for those that do; here both work, since the ``+`` is taken off. ``+foo=1`` would add a key
silently, a misspelt option of an optional group would be dropped silently; both are refused here,
and everything else is left to Hydra's own composition.
"""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from data.files import kind_of
from train.config.aliases import meant_by_flag, meant_by_key
from train.config.gathered import all_problems
from train.config.hydra_keys import check_hydra_key
from train.config.load import describe, load
from train.config.schema import RunConfig
from train.config.values import holds_text, shape_problems, shown, type_of, unknown_key
from train.errors import ROOT, USER_ERRORS, Problems, UserError

CONF = ROOT / "conf"
_NOT_OURS = ("--shell-completion", "-sc", "--experimental-rerun")  # of Hydra's flags
_FLAGS = {  # each flag with what Hydra does with it
    flag: action
    for flag, action in get_args_parser()._option_string_actions.items()
    if flag not in _NOT_OURS
}
# What Hydra says in its first line, and how we say it; what it says otherwise is passed on.
_SAID = (
    (r"Cannot find primary config '(.+?)'.*", r"--config-name \1: there is no such file"),
    (r"Additional config directory '(.+)' not found", r"--config-dir \1: there is no such folder"),
    (r"Primary config directory not found.*", "--config-path: there is no such folder"),
    (
        r"In '.+': Could not find '(hydra/.+)/(.+)'",
        r"\1=\2: Hydra has no such file; --info searchpath tells where it looks",
    ),
    (
        r"Could not override '(hydra\.[\w.]+)'.*",
        r"unknown config key \1: Hydra's own section, which --cfg hydra shows, has no such key",
    ),
)
_SHOWING = {"--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--version"}
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
    cleaned = [re.sub(r"^\++(?!hydra[./=])", "", arg) for arg in args]
    problems, (flags, overrides) = Problems(), _split(cleaned)
    problems.lines += _check_flags(flags)
    own_conf = not any(flag.split("=")[0] in _FOREIGN for flag in flags)
    check = partial(_check_override, known=known, conf=conf if own_conf else None)
    sweep, ranges = sweeps(flags), has_own_sweeper(overrides)
    for override in overrides:
        problems.of(partial(check, override, sweep=sweep, ranges=ranges))
    problems.refuse()
    flags = ["--info=all" if flag in ("--info", "-i") else flag for flag in flags]
    gathered = _gather_items(overrides)
    return [*flags, *gathered, *(sweep_folder(gathered) if sweep else ())]


def acceptable(args: Sequence[str]) -> list[str]:
    """The keys and options that :func:`normalise` would take.

    Args:
        args: of which it refuses some.
    """
    good, known, sweep, ranges = [], groups(), sweeps(args), has_own_sweeper(args)
    for arg in _split(args)[1]:
        with suppress(*USER_ERRORS):
            _check_override(arg.lstrip("+"), known, CONF, sweep, ranges)
            good.append(arg)
    return good


def sweeps(args: Sequence[str]) -> bool:
    """Whether the command line asks for several jobs."""
    return "-m" in args or "--multirun" in args


def has_own_sweeper(args: Sequence[str]) -> bool:
    """Whether the command line names the sweeper, which may choose values out of ``interval()``."""
    named = [arg.lstrip("+").partition("=") for arg in args]
    return any(key == "hydra/sweeper" and value != "basic" for key, _, value in named)


def shows_only(args: Sequence[str]) -> bool:
    """Whether the command line asks for a config or for help, and for no run."""
    return not _SHOWING.isdisjoint(arg.partition("=")[0] for arg in args)


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
    return OverridesParser.create(_options_loader()).parse_overrides(_split(overrides)[1])


@cache
def _options_loader() -> ConfigLoader:
    """Knows the options of each group, among which ``glob(...)`` chooses."""
    with _hydra_aside(), initialize_config_dir(str(CONF), version_base=None):
        return GlobalHydra.instance().config_loader()


def compose_run(
    args: Sequence[str] = (),
    conf: Path = CONF,
    also: Callable[[RunConfig], object] | None = None,
) -> RunConfig:
    """The validated run that a command line describes, for scripts and tests.

    Args:
        args: groups and keys as on the command line, without flags.
        conf: folder of the groups.
        also: what else is to be checked; raises what is wrong.

    Raises:
        ValueError: as :func:`normalise` and :func:`train.config.load.load`.
    """

    def check(words: Sequence[str]) -> RunConfig:
        run = load(composed(words, conf))
        if also is not None:
            also(run)
        return run

    try:
        return check(args)
    except USER_ERRORS as error:
        raise all_problems(error, args, acceptable(args), check) from error


def composed(args: Sequence[str] = (), conf: Path = CONF) -> DictConfig:
    """The config of a command line as Hydra composes it; arguments as of :func:`compose_run`."""
    return composed_as_hydra_reads(normalise(args, conf), conf)


def composed_as_hydra_reads(
    words: Sequence[str], conf: Path = CONF, with_hydra: bool = False
) -> DictConfig:
    """The same for overrides as :func:`normalise` returned them, without flags.

    Args:
        words: the overrides.
        conf: folder of the config.
        with_hydra: with Hydra's own section.
    """
    with _hydra_aside(), initialize_config_dir(str(conf), version_base=None):
        with composition_errors():
            return compose("config", list(words), return_hydra_config=with_hydra)


@contextmanager
def _hydra_aside() -> Iterator[None]:
    """Leave Hydra's one state, in a job the job's, as it is found."""
    state = GlobalHydra.instance()
    before, state.hydra = state.hydra, None
    try:
        yield
    finally:
        state.hydra = before


@contextmanager
def composition_errors() -> Iterator[None]:
    """Tell in one line what Hydra, or the config library below it, cannot compose."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    except HydraException as error:
        first = str(error).splitlines()[0]
        for said, ours in _SAID:
            if re.fullmatch(said, first):
                raise UserError(shown(re.sub(said, ours, first), 300)) from error
        where = shown(first.removeprefix("Error merging override "), 300)
        key = where.partition("=")[0].split(".")
        if part := next((n for n in range(len(key)) if get_origin(type_of(key[:n])) is list), 0):
            raise UserError(
                f"{where}: there is no such item to be changed; give all of {'.'.join(key[:part])}"
            ) from error
        if isinstance(error.__cause__, OmegaConfBaseException):
            raise UserError(f"{where}: {describe(error.__cause__)}") from error
        raise UserError(f"the command line makes no config: {where}") from error


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides; Hydra itself takes overrides only in one block."""
    flags: list[str] = []
    overrides: list[str] = []
    awaits_value = False
    for arg in args:
        flag = arg.split("=")[0]
        if arg.startswith("-"):
            flags.append(arg)
            # What follows a flag that is none, and is no override, belongs to it.
            awaits_value = "=" not in arg and (flag not in _FLAGS or _FLAGS[flag].nargs is None)
        elif awaits_value and "=" not in arg:
            flags[-1:] = [flags[-1], arg] if flags[-1] in _FLAGS else [f"{flags[-1]}={arg}"]
            awaits_value = False
        else:
            overrides.append(arg)
            awaits_value = False
    return flags, overrides


def _check_flags(flags: Sequence[str]) -> Iterator[str]:
    """What is wrong with flags, which stand with their values as :func:`_split` gives them."""
    names = {flag.partition("=")[0] for flag in flags}
    for flag, following in itertools.pairwise([*flags, "-"]):
        name, given, value = flag.partition("=")
        if not name.startswith("-"):
            continue
        if name not in _FLAGS:
            meant = meant_by_flag(name)
            hint = f"give {meant}" if meant else _hint(name, list(_FLAGS), "see --help", 0.75)
            yield f"unknown flag {name}: {hint}"
        elif _FLAGS[name].nargs == 0 and given:
            yield f"{name} takes no value, got {shown(repr(value))}"
        elif _FLAGS[name].nargs is None:
            value = value if given else following
            choices = [str(choice) for choice in _FLAGS[name].choices or ()]
            if value.startswith("-"):
                yield f"{name} needs a value"
            elif choices and value not in choices:
                yield f"{name} {value} is none of {', '.join(choices)}"
            elif name in ("--package", "-p") and not value.startswith(("hydra", "_")):
                problem = unknown_key(value.split("."), RunConfig)
                yield from () if problem is None else (f"{name} {value}: {problem}",)
    if "--resolve" in names and names.isdisjoint(("--cfg", "-c", "--help")):
        yield "--resolve acts on what --cfg job or --help shows: give one of them"


def _gather_items(overrides: Sequence[str]) -> list[str]:
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
            keys.append([f"{parts[-1]}:{choice}" for choice in _choices(override, value)])
        else:
            keys.append([value.strip().removeprefix("{").removesuffix("}")])
    for path, named in items.items():
        dicts = []
        for chosen in itertools.product(*(itertools.product(*keys) for keys in named.values())):
            inner = (f"{name}:{{{','.join(k)}}}" for name, k in zip(named, chosen, strict=True))
            dicts.append(f"{{{','.join(inner)}}}")
        out.append(f"++{path}={','.join(dicts)}")  # the dict is closed to plain overrides
    return out


def _choices(override: str, value: str) -> list[str]:
    """Values of an item's key, each as Hydra's grammar writes it."""
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_sweep_override() and not parsed.is_discrete_sweep():
        raise UserError(f"{override}: a key of a named item takes values, no range to choose from")
    return list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [value]


def _item_depth(parts: Sequence[str]) -> int | None:
    """How many parts name an item of a dict of sections, if the key leads into one."""
    for depth in range(len(parts)):
        schema = type_of(parts[:depth])
        if get_origin(schema) is dict and is_dataclass(get_args(schema)[1]):
            return depth + 1
    return None


def _check_override(
    arg: str, known: Sequence[str], conf: Path | None, sweep: bool, ranges: bool = False
) -> None:
    override = _read(arg, known, conf, ranges)
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        check_hydra_key(arg, key, override.value())
        return
    found = override.value()
    if override.is_delete():
        raise UserError(f"{arg}: nothing is taken out of a config; give {key.lstrip('~')}=VALUE")
    if override.package is not None or not set(key).isdisjoint("@/"):
        hint = f"did you mean {key.replace('/', '.')}?" if "/" in key else "give GROUP=OPTION"
        raise UserError(f"unknown config key {arg}: {hint}")
    if key in known and not isinstance(found, dict):
        if isinstance(found, list) or found is None:
            raise UserError(f"{arg} must be the name of one file of conf/{key}, without its .yaml")
        if conf is not None:
            _check_option(key, arg.partition("=")[2], conf)
    if override.is_sweep_override() and not sweep:
        value, hint = arg.partition("=")[2], ""
        if holds_text(key.split(".")):
            hint = f"; one value with a comma is quoted, {key}='\"{value}\"'"
        raise UserError(f"{arg}: several values need -m{hint}")
    if key not in known or isinstance(found, dict):
        _check_key(arg, key, override, known)


def _read(arg: str, known: Sequence[str], conf: Path | None, ranges: bool) -> Override:
    """An argument as Hydra reads it.

    Raises:
        UserError: it cannot; what to type instead.
    """
    try:
        override = OverridesParser.create().parse_override(arg)
    except HydraException as error:
        near = [group for group in known if conf and arg in options(group, conf)]
        hint = f"did you mean {near[0]}={arg}?" if near else "give GROUP=OPTION or KEY=VALUE"
        if not near and (good := _quoted(arg)):
            hint = f"such a text is quoted, for the shell and in it: {good}"
        raise UserError(f"cannot read the argument {shown(repr(arg))}: {hint}") from error
    if not override.key_or_group:
        raise UserError(f"cannot read the argument {arg!r}: give GROUP=OPTION or KEY=VALUE")
    if override.is_sweep_override() and not override.is_discrete_sweep() and not ranges:
        raise UserError(f"{arg}: no list of values; give VALUE,VALUE or range(FIRST,END,STEP)")
    found = override.value()
    if isinstance(found, int | float) and str(found) != arg.partition("=")[2]:
        if good := _quoted(arg):
            raise UserError(f"{arg} would be read as {found}: a text is quoted, {good}")
    return override


def _check_key(arg: str, key: str, override: Override, known: Sequence[str]) -> None:
    """Refuse a key that there is not, and a value that it cannot take."""
    path, found = key.split("."), override.value()
    problem, schema = unknown_key(path, RunConfig, known), type_of(path)
    meant = meant_by_key(key)
    if isinstance(found, str | int | float) and is_dataclass(schema):
        own = ", ".join(f"{key}.{part.name}" for part in fields(schema))
        raise UserError(f"{arg}: {key} is a section; give {meant or own}")
    if problem is not None:
        raise UserError(f"unknown config key {arg}: {f'give {meant}' if meant else problem}")
    for depth in range(len(path) + 1):
        pairs = type_of(path[:depth])
        if get_origin(pairs) is dict and not is_dataclass(get_args(pairs)[1]):
            raise UserError(
                f"{arg}: patterns cannot be written on a command line; {'.'.join(path[:depth])}"
                " stands in a file of its group, as in conf/optim/muon_heads.yaml"
            )
    for text, value in _values(arg, override):
        for line in shape_problems(value, schema, key):
            raise UserError(line.replace(f"{key}={shown(value)}", shown(text), 1))


def _values(arg: str, override: Override) -> Iterator[tuple[str, Any]]:
    """The value that an argument gives, or those of a sweep, each with the argument for it."""
    if not override.is_sweep_override():
        yield arg, override.value()
        return
    if isinstance(override.value(), Glob):
        raise UserError(f"{arg}: glob() chooses among the files of a group, and this is a key")
    if not override.is_discrete_sweep():
        return  # which values, its sweeper says, and each job is checked
    for text in override.sweep_string_iterator():
        one = f"{override.key_or_group}={text}"
        yield one, OverridesParser.create().parse_override(one).value()


def _quoted(arg: str) -> str | None:
    """The argument as one types it where its value is a text; None where its key holds none."""
    key, _, value = arg.partition("=")
    if not holds_text(key.lstrip("+").split(".")):
        return None
    for mark in ('"', "'"):
        typed = f"{key}={mark}{value.replace(mark, chr(92) + mark)}{mark}"
        try:
            if OverridesParser.create().parse_override(typed).value() == value:
                return shlex.quote(typed)
        except HydraException:
            continue
    return None


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


def _hint(word: str, known: Sequence[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(word, known, 1, cutoff)
    return f"did you mean {near[0]}?" if near else otherwise or f"there are: {', '.join(known)}"
