"""All that can be asked of a run before anything large is made; what cannot be is told in one go.

Checks stand on each other: the plan on ranges, the layout on the world, rows on both. A check whose
ground is refused is left out, or made on what can be said; of the problems of one config the user
reads all that do not follow from one another.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from conf.ranges import out_of_range
from data.config import SourceConfig, SourceKind
from data.files import find_files, is_one_document, shown
from data.prepare import open_store
from data.tokenizer import Tokenizer, load_tokenizer
from parallel.launch import launched_rank, launched_world_size
from train.checkpoint.retention import published
from train.config.load import validate
from train.config.schema import RunConfig
from train.errors import Problems, UserError
from train.preflight.reach import check_reach
from train.run_folder.folder import CHECKPOINTS, check_run_folder, make_writable
from train.stages import StagePlan, check_contexts, check_rows, check_schedule, survey

if TYPE_CHECKING:
    from train.preflight.precision import Measure, PrecisionChoice
    from train.preflight.world import World


def check_run(
    run: RunConfig,
    measure: Measure | None = None,
    files: bool = True,
    alone: bool = False,
    here: bool = True,
) -> tuple[RunConfig, PrecisionChoice | None]:
    """Make every check of a run. Collective over the ranks, unless ``alone``.

    Args:
        run: as asked.
        measure: see :func:`train.preflight.precision.settle`.
        files: whether to look at the files and servers that the config names too, and to make the
            run's folder.
        alone: this rank asks for itself, and no precision is measured.
        here: whether it is this machine and these ranks that run it; else nothing is asked of them.

    Returns:
        The run, its precision settled, and why it computes in it; None where that was asked for.

    Raises:
        UserError: all that it cannot be, here; as the packages' own errors.
    """
    problems, ranged = Problems(), not any(out_of_range(run, ""))
    problems.of(lambda: validate(run))
    files = files and not launched_rank()
    if files:
        files = _is_writable(run, problems)
        _check_named(run, problems, begun=files and _has_begun(run))
    if not ranged:  # nothing can be computed from such numbers
        problems.refuse()
    plan, wrong = survey(run)
    problems.lines += wrong
    # torch takes seconds, which no number beyond its range should cost
    from train.preflight.precision import assumed, settle  # noqa: PLC0415
    from train.preflight.world import poorest, this_world  # noqa: PLC0415

    world = problems.of(lambda: this_world(run.train.device)) if here else None
    choice = None
    if world is not None and not alone:
        world = poorest(world)
    if problems or alone or world is None:
        run = problems.of(lambda: assumed(run)) or run
    else:
        run, choice = settle(run, world, measure)
    _check_world(run, plan, world, problems, uneven=bool(wrong), here=here)
    if files:
        problems.of(lambda: check_run_folder(run, tell=False))
    problems.refuse()
    return run, choice


def _check_world(
    run: RunConfig,
    plan: StagePlan | None,
    world: World | None,
    problems: Problems,
    uneven: bool,
    here: bool,
) -> None:
    """Whether this machine, and this many ranks, can do it.

    Args:
        run: its precision settled, or assumed.
        plan: None where it cannot be counted.
        world: None where it is refused, or another.
        problems: of which there may be some.
        uneven: something is wrong with the plan's rows or lengths.
        here: see :func:`check_run`.
    """
    from model.kernels.select import check_kernels  # noqa: PLC0415
    from parallel.mesh import check_layout  # noqa: PLC0415
    from train.audit.updates import check_audited  # noqa: PLC0415
    from train.preflight import fit  # noqa: PLC0415
    from train.preflight.engine import check_engine  # noqa: PLC0415

    problems.of(lambda: check_audited(run))
    if world is not None:
        problems.of(lambda: check_kernels(run.model, world.device))
    if plan is None:
        return
    if world is not None:
        problems.of(lambda: fit.check(run, plan, world))
        problems.of(lambda: check_engine(run, plan, world.device))
    problems.of(lambda: check_reach(run, plan))
    if problems.misfit is not None or not here:  # on another machine the layout is another
        return
    layout = problems.of(lambda: run.parallel.resolve(launched_world_size()))
    if layout is None:
        return
    problems.of(lambda: check_layout(layout, run.model))
    before = len(problems.lines)
    problems.of(lambda: check_contexts(plan, run, layout))
    if uneven or len(problems.lines) > before:
        return
    problems.of(lambda: check_rows(plan, layout.data_degree))
    if len(problems.lines) == before:
        problems.of(lambda: check_schedule(plan, layout))


def _is_writable(run: RunConfig, problems: Problems) -> bool:
    """Whether there is a folder to write to; it is made."""
    before = len(problems.lines)
    if run.run_dir.strip():
        problems.of(lambda: make_writable(Path(run.run_dir)))
        return len(problems.lines) == before
    return False


def _has_begun(run: RunConfig) -> bool:
    return bool(published(Path(run.run_dir) / CHECKPOINTS))


def _check_named(run: RunConfig, problems: Problems, begun: bool) -> None:
    """Whether what the config names is there: servers, and of a new run text and weights."""
    from train.checkpoint.manager import check_source  # noqa: PLC0415
    from train.preflight.services import check_services  # noqa: PLC0415
    from train.run_folder.tokenizer import check_tokenizer  # noqa: PLC0415

    problems.of(lambda: check_services(run))
    if begun:
        return
    for name, source in run.data.named_sources().items():
        if source.kind in (SourceKind.text, SourceKind.jsonl, SourceKind.parquet) and source.path:
            problems.of(partial(_check_files, name, source, run.data.validation.bytes))
        elif source.kind is SourceKind.store and source.path:
            store = problems.of(partial(open_store, name, source))
            if store is not None and run.data.tokenizer == "bpe":
                key = f"data.sources.{name}.path={shown(source.path)}"
                problems.of(partial(_check_ids, run, store.tokenizer, key))
    if run.data.tokenizer not in ("", "bpe"):
        tokenizer = problems.of(lambda: load_tokenizer(run.data.tokenizer))
        if tokenizer is not None:
            problems.of(lambda: _check_ids(run, tokenizer, f"data.tokenizer={run.data.tokenizer}"))
    if run.init_from:
        problems.of(lambda: check_source(run.init_from))
        problems.of(lambda: check_tokenizer(run))


def _check_ids(run: RunConfig, tokenizer: Tokenizer, key: str) -> None:
    """Whether the model has a row for every id that the tokenizer which ``key`` names may give."""
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the {tokenizer.vocab_size}"
            f" ids of {key}: give {tokenizer.vocab_size} or more"
        )


def _check_files(name: str, source: SourceConfig, held_out: int) -> None:
    """Whether a path means files, and enough of them to hold out ``held_out`` bytes, if not 0."""
    find_files(name, source)
    if held_out and is_one_document(name, source):
        key = f"data.sources.{name}"
        raise UserError(
            f"{key}.path={shown(source.path)} is one file and {key}.unit={source.unit.value}: of"
            f" one document nothing can be held out (data.validation.bytes={held_out});"
            f" {key}.unit=paragraph divides it, data.validation.bytes=0 trains without validation"
        )
