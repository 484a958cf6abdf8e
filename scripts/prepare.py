"""From a folder, files or a hub dataset to a token store, and a summary of what it holds.

Text is tokenised once; the store is memory-mapped and checksummed.

Several processes share the work; killed and started again by the same command it goes on where it
was. The store holds the training shards, the held-out documents with their text, and the tokenizer.
"""

from __future__ import annotations

import argparse
import glob
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.cache import build_once
from data.config import DataConfig, OnBadLine, SourceConfig, SourceKind, TextUnit, ValidationConfig
from data.errors import ConfigError, DiskError
from data.files import is_one_document, kind_of
from data.prepare import Corpus, build_tokenizer
from data.summary import summarise
from data.token_store import TokenStore
from data.tokenise import FINISHED, SHARD_BYTES, StoreJob, write_store
from data.tokenizer import Tokenizer
from scripts.cli.command import command
from scripts.cli.parser import CommandParser, real, whole
from train.errors import UserError, lines_of, one_line

EPILOG = """examples:
  v4 prepare books/                                to stores/books: text, JSON lines or Parquet
  v4 prepare 'web/*.parquet' --tokenizer deepseek-v4 --workers 16 --out stores/web
  v4 prepare HuggingFaceFW/fineweb-edu --subset sample-10BT
  v4 prepare --verify stores/web

then train on it:
  v4 pretrain data=store data.sources.store.path=stores/books
"""

# Keys of a run, in which the data's errors speak -> the option here; those of a source stand behind
# data.sources.NAME.
_SOURCE_OPTIONS = {
    key: f"--{key.replace('_', '-')}"
    for key in ("kind", "text_key", "unit", "on_bad_line", "subset", "split", "revision",
                "packages")
}  # fmt: skip
_OPTIONS = {
    "data.tokenizer": "--tokenizer",
    "data.vocab_size": "--vocab-size",
    "data.cache_dir": "--cache-dir",
    "data.workers": "--workers",
    "data.validation.bytes": "--validation-bytes",
    "data.validation.max_fraction": "--validation-fraction",
    "data.validation.seed": "--validation-seed",
    "data.validation.max_overlap": "--max-overlap",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@command(logging.INFO)
def main(words: Sequence[str] | None = None) -> None:
    """Make or verify a store."""
    options = parse(words)
    if options.verify:
        store = TokenStore(options.verify, f"--verify {options.verify}")
        store.verify()
        report(store)
        return
    with _told_in_options(options.cfg):
        corpus, store, tokenizer = prepare(options)
        report(store)
        if options.summary:
            (name,) = corpus.sources
            told = summarise(corpus.documents(name), store, tokenizer).lines()
            print("\n".join(f"  {line}" for line in told))


@contextmanager
def _told_in_options(cfg: DataConfig) -> Iterator[None]:
    """Let errors and log lines name this command's options, not the keys of a run."""

    def translate(record: logging.LogRecord) -> bool:
        record.msg, record.args = _in_options(record.getMessage(), cfg), ()
        return True

    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(translate)
    try:
        yield
    except (ConfigError, UserError) as error:
        raise UserError(*(_in_options(line, cfg) for line in lines_of(error))) from error
    except DiskError as error:
        raise DiskError(_in_options(str(error), cfg)) from error
    finally:
        for handler in handlers:
            handler.removeFilter(translate)


def _in_options(text: str, cfg: DataConfig) -> str:
    """A line about keys of a run, in the words of this command."""
    ((name, source),) = cfg.sources.items()
    own = f"data.sources.{name}"
    text = text.replace(f"{own}.path=", "")
    for key, option in {
        **{f"{own}.{k}": option for k, option in _SOURCE_OPTIONS.items()}, **_OPTIONS,
    }.items():  # fmt: skip
        text = text.replace(f"{key}=", f"{option} ")
        text = re.sub(rf"{re.escape(key)}(?![\w.])", option, text)
    for key, said in ((own, source.path or "--packages"), ("data.sources:", "--packages:"),
                      ("text_key=", "--text-key ")):  # fmt: skip
        text = text.replace(key, said)
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    v = ValidationConfig()
    parser = CommandParser(description=__doc__, epilog=EPILOG, beyond="--out {}")
    parser.add_argument(
        "source", nargs="?", default="", help="file, folder, glob pattern or hub name"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--out", type=Path, help="folder of the new store (default: stores/NAME)")
    what.add_argument("--verify", type=Path, help="compare a store with its checksums and leave")
    made = (SourceKind.store, SourceKind.synthetic)  # there is nothing to prepare
    kinds = [kind.value for kind in SourceKind if kind not in made]
    parser.add_argument("--kind", choices=kinds, default="",
                        help="kind of source (default: by the suffixes of its files)")  # fmt: skip
    parser.add_argument("--path", default="", help="the source, by another name")
    parser.add_argument("--summary", action=argparse.BooleanOptionalAction, default=True,
                        help="read all documents once more and tell what they are")  # fmt: skip
    parser.add_argument("--text-key", default="text", help="column with the text")
    parser.add_argument("--unit", choices=[u.value for u in TextUnit], default="document",
                        help="what one document is in a text file")  # fmt: skip
    parser.add_argument("--on-bad-line", choices=[o.value for o in OnBadLine], default="error",
                        help="what becomes of lines that cannot be read")  # fmt: skip
    parser.add_argument("--subset", default="", help="configuration of a hub dataset")
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--revision", default="", help="revision of a hub dataset")
    parser.add_argument("--packages", nargs="+", default=SourceConfig().packages,
                        help="of the embedded corpus, or whose sources are taken")  # fmt: skip
    parser.add_argument("--tokenizer", default="bpe", help="as data.tokenizer (default: bpe)")
    parser.add_argument("--vocab-size", type=whole(least=1, most=1 << 20),
                        default=4096, help="of a trained bpe")  # fmt: skip
    parser.add_argument("--workers", type=whole(least=1), default=1, help="processes")
    parser.add_argument("--shard-bytes", type=whole(least=1), default=SHARD_BYTES,
                        help="text of a shard, the unit of work and of resuming")  # fmt: skip
    parser.add_argument("--cache-dir", default=".cache/data", help="as data.cache_dir")
    parser.add_argument("--validation-bytes", type=whole(least=0), default=v.bytes,
                        help="text held out")  # fmt: skip
    parser.add_argument("--validation-fraction", type=real(least=0, most=1),
                        default=v.max_fraction, help="of the text, held out at most")  # fmt: skip
    parser.add_argument("--validation-seed", type=whole(least=0), default=v.seed,
                        help="chooses the documents")  # fmt: skip
    parser.add_argument("--max-overlap", type=real(least=0, most=1), default=v.max_overlap,
                        help="repeated shingles that are let pass in it")  # fmt: skip
    return parser.read(arguments, _check_source, _settle, _check_folder, _check_documents)


def _check_source(options: argparse.Namespace) -> None:
    """One source is named, in one of two ways."""
    if options.source and options.path:
        raise UserError(f"--path {options.path} and {options.source}: name one source")
    if not (options.source or options.path or options.kind or options.verify):
        raise UserError("name a source: a file, a folder, a glob pattern or a hub dataset")


def _settle(options: argparse.Namespace) -> None:
    """The folder of the store, and the ``data`` section that it is made from."""
    path = options.source or options.path
    if not (path or options.kind or options.verify):
        return
    kind = SourceKind(options.kind) if options.kind else _kind_of(path)
    if kind is SourceKind.hub and not options.kind and not _HUB_NAME.fullmatch(path):
        raise UserError(
            f"{path}: there is no such file, folder or pattern, and a dataset of the hub is called"
            f" OWNER/NAME (--kind hub takes {path} for one all the same)"
        )
    if options.out is None:
        options.out = Path("stores") / (Path(path).name.partition(".")[0] or kind.value)
    source = SourceConfig(
        kind=kind,
        path=path,
        text_key=options.text_key,
        unit=TextUnit(options.unit),
        on_bad_line=OnBadLine(options.on_bad_line),
        subset=options.subset,
        split=options.split,
        revision=options.revision,
        packages=options.packages,
    )
    options.cfg = DataConfig(
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        cache_dir=options.cache_dir,
        sources={options.out.name or "store": source},
        workers=options.workers,
        validation=ValidationConfig(
            bytes=options.validation_bytes,
            max_fraction=options.validation_fraction,
            seed=options.validation_seed,
            max_overlap=options.max_overlap,
        ),
    )
    if not options.verify:
        with _told_in_options(options.cfg):
            options.cfg.validate()


def _check_folder(options: argparse.Namespace) -> None:
    out = options.out
    if not options.verify and out.exists() and not (out / "manifest.json").is_file():
        raise UserError(f"--out {out} exists and is not a token store: name another folder")


def _check_documents(options: argparse.Namespace) -> None:
    """Documents can be held out: of one there is nothing to hold out."""
    ((name, source),) = options.cfg.sources.items()
    if options.verify or not options.validation_bytes:
        return
    with _told_in_options(options.cfg):
        alone = is_one_document(name, source)
    if not alone:
        return
    raise UserError(
        f"{source.path} is one file and --unit {options.unit}: of one document nothing can be held"
        f" out (--validation-bytes {options.validation_bytes}); --unit paragraph divides it,"
        " --validation-bytes 0 holds out nothing"
    )


def prepare(options: argparse.Namespace) -> tuple[Corpus, TokenStore, Tokenizer]:
    """Make the store, or go on making it.

    Returns:
        The documents, the store, and the tokenizer.

    Raises:
        ValueError: the source, the tokenizer or the folder cannot be used.
    """
    cfg: DataConfig = options.cfg
    out: Path = options.out
    (name,) = cfg.sources
    tokenizer = build_tokenizer(cfg)
    corpus = Corpus(cfg)
    plan = corpus.key

    def build(folder: Path) -> None:
        job = StoreJob(name, corpus.documents(name), folder)
        write_store(job, corpus.split[name], tokenizer, plan, cfg.workers, options.shard_bytes)

    finished = out.is_dir()
    build_once(out, build, resume=FINISHED, key=f"--out {out}")
    store = TokenStore(out, f"--out {out}")
    if finished and (store.plan["corpus"], store.plan["tokenizer"]) != (plan, tokenizer.hash):
        raise UserError(f"--out {out} holds a store of another source or tokenizer")
    return corpus, store, tokenizer


def _kind_of(path: str) -> SourceKind:
    """By what is there; of a glob pattern by its first file."""
    try:
        found = sorted(glob.glob(path, recursive=True))
        return kind_of(Path(found[0] if found and not Path(path).exists() else path).expanduser())
    except (OSError, RuntimeError) as error:  # a name too long, no home of that user
        raise UserError(f"{path[:60]}: {one_line(error)}"[:300]) from error


def report(store: TokenStore) -> None:
    """What the store holds."""
    train, held = store.train, store.validation
    print(f"{store.folder}: {store.hash[:16]}")
    print(f"  training    {len(train):>10} documents {train.num_tokens:>14} tokens")
    print(f"  validation  {len(held):>10} documents {held.num_tokens:>14} tokens")
    removed = store.manifest["near_duplicates_removed"]
    print(f"  near-duplicates of training text removed: {removed}")
    print(
        f"  tokenizer   {store.manifest['vocab_size']} ids, {store.manifest['tokenizer_hash'][:16]}"
    )


if __name__ == "__main__":
    sys.exit(main())
