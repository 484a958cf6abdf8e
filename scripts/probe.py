"""What a model does with what lies far behind: needles, copies, loss by position, attention.

Models may be runs, checkpoints, transformers folders or official folders; a folder of another kind
of causal model is read by transformers, and its attention is not looked at. Needles, copies and
tables are written from a seed with the model's own tokenizer. Documents for the losses come from
--text, or of a run from its own held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from data.loader import build_loader
from data.tokenizer import Tokenizer, folder_tokenizer
from model.transformer import DeepSeekV4
from quant.config import Recipe
from scripts.cli.command import command
from scripts.cli.model_options import add_chunk_option, add_weights_option, open_model
from scripts.cli.outputs import PNG, check_output, write_text
from scripts.cli.parser import CommandParser, whole
from train.errors import UserError, one_line
from train.exchange.output_files import make_folder
from train.probes.attention import attention_by_distance
from train.probes.found import answers_found
from train.probes.measures import (
    as_rows,
    edges,
    loss_by_position,
    needles,
    repeats,
    retrieval,
    tail_losses,
)
from train.probes.pictures import draw_attention, draw_needles, draw_positions
from train.probes.reader import CacheReader, Reader, TransformersReader
from train.probes.tasks import (
    ALL_NEEDLES,
    LEAST_TOKENS,
    NEEDLES,
    WITH_PLACE,
    needle,
    watched_document,
    window_reach,
)
from train.run_folder.folder import CONFIG, read_run
from train.stages import resolve

MARK = '"probes": "long context"'
_MOST_DOCUMENTS = 32  # of a run's held-out text that are read, the longest ones
EPILOG = """--out holds
  probe.json         everything, by model
  NAME_needles.png   right answers by depth and length
  NAME_attention.png where each layer's attention goes, and the indexer's recall
  positions.png      loss by position, of all models

examples:
  scripts/probe.py runs/hybrid runs/window --lengths 512,2048 --out runs/probes
  scripts/probe.py out/nano --text book.txt --only losses --out runs/book
"""
PROBES = ("losses", "needles", "repeats", "attention")


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Probe."""
    probe(parse(words))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("models", type=Path, nargs="+", metavar="RUN",
                        help="run, checkpoint, transformers folder or official folder")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of documents")
    parser.add_argument("--needle", choices=ALL_NEEDLES, action="append", default=[],
                        help=f"may be repeated (default: {', '.join(NEEDLES)})")  # fmt: skip
    parser.add_argument(
        "--depths", type=whole(least=1), default=5, help="depths of needles, 0 to 1"
    )
    parser.add_argument("--count", type=whole(least=1), default=4, help="documents of a cell")
    parser.add_argument("--seed", type=whole(least=0), default=0, help="of what is written")
    parser.add_argument("--text", type=Path, action="append", default=[],
                        help="UTF-8, one document; may be repeated")  # fmt: skip
    parser.add_argument(
        "--tail", type=whole(least=1), default=500, help="last tokens that are compared"
    )
    parser.add_argument("--train-length", type=whole(least=1),
                        help="tokens of a trained row (default: the run's)")  # fmt: skip
    parser.add_argument("--only", choices=PROBES, action="append", default=[],
                        help="may be repeated (default: all)")  # fmt: skip
    parser.add_argument("--quant", choices=[r.value for r in Recipe], help="as for score")
    add_weights_option(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of matmuls")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add_chunk_option(parser)
    return parser.read(arguments, check, _check_names, _check_out, _check_texts)


def probe(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError: a model or a text cannot be read, or an option cannot be.
    """
    lengths, names, out = check(options), _names(options), options.out
    found = {}
    for name, path in zip(names, options.models, strict=True):
        found[name] = probe_model(path, options, lengths)
    make_folder(out)
    told = {"probes": "long context", "seed": options.seed, "models": found}
    write_text(out / "probe.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
    for name, result in found.items():
        if "needles" in result:
            draw_needles(result["needles"], out / f"{name}_needles.png", name)
        if result.get("attention"):
            draw_attention(result["attention"], out / f"{name}_attention.png", name)
    lines = {n: r["positions"] for n, r in found.items() if r.get("positions")}
    if lines:
        draw_positions(lines, out / "positions.png")
    print(table(found))


def check(options: argparse.Namespace) -> list[int]:
    """The lengths asked for.

    Raises:
        UserError: an option that cannot be; names it.
    """
    try:
        lengths = sorted({int(word) for word in options.lengths.split(",")})
    except ValueError:
        raise UserError(f"--lengths {options.lengths} must be numbers with commas") from None
    if lengths[0] < LEAST_TOKENS:
        raise UserError(
            f"--lengths {options.lengths}: {lengths[0]} must be at least {LEAST_TOKENS}"
        )
    return lengths


def _names(options: argparse.Namespace) -> list[str]:
    return [path.name or str(path) for path in options.models]


def _check_names(options: argparse.Namespace) -> None:
    names = _names(options)
    if len(set(names)) < len(names):
        raise UserError(f"RUN: {', '.join(names)}: two models have one name")


def _check_texts(options: argparse.Namespace) -> None:
    for text in options.text:
        _read_text(text)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path} cannot be read: {one_line(error)}") from error
    if not text.strip():
        raise UserError(f"--text {path} has no text")
    return text


def _check_out(options: argparse.Namespace) -> None:
    pictures = [
        f"{name}_{kind}.png" for name in _names(options) for kind in ("needles", "attention")
    ]
    check_output("--out", options.out / "probe.json", MARK)
    for picture in (*pictures, "positions.png"):
        check_output("--out", options.out / picture, PNG)


def probe_model(path: Path, options: argparse.Namespace, lengths: list[int]) -> dict[str, Any]:
    """All probes of one model that were asked for, JSON values."""
    options.model = path
    model, reader, tokenizer = open_reader(path, options)
    only, kinds, longest = options.only or PROBES, options.needle or NEEDLES, lengths[-1]
    if longest > reader.max_tokens:
        raise UserError(
            f"--lengths {options.lengths}: {longest} exceeds the {reader.max_tokens} positions of"
            f" {path}"
        )
    reach = None if model is None else window_reach(model.config)
    depths = np.linspace(0, 1, options.depths).tolist() if options.depths > 1 else [0.5]
    result: dict[str, Any] = {"lengths": lengths, "window_reach": reach}
    if "losses" in only:
        result |= losses(path, options, reader, tokenizer, model, longest)
    cells = []
    if "needles" in only:
        total = len(lengths) * len(depths) * len(kinds)
        with tqdm(total=total, desc=f"needles {path.name}", unit="cell", disable=None) as bar:
            cells = needles(reader, tokenizer, kinds, lengths, depths, options.count, options.seed,
                            reach, bar.update)  # fmt: skip
        result["needles"] = as_rows(cells)
    if "repeats" in only:
        again = repeats(reader, tokenizer, lengths, options.count, options.seed, reach)
        result["repeats"] = as_rows(again)
        cells += again
    result["retrieval"] = retrieval(cells)
    if "attention" in only and model is not None:
        ids_N = watched_document(tokenizer, kinds, longest, options.seed)
        result["attention"] = attention_by_distance(model, torch.from_numpy(ids_N), edges(longest))
        result["answers"] = answers(model, tokenizer, kinds, longest, depths, options)
    return result


def answers(
    model: DeepSeekV4, tokenizer: Tokenizer, kinds: Sequence[str], length: int,
    depths: Sequence[float], options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """By task and depth whether each layer looks at the answer's place."""
    found = []
    for kind in kinds:
        for depth in depths if kind in WITH_PLACE else ():
            asked = [needle(tokenizer, kind, length, depth, options.seed, n)
                     for n in range(options.count)]  # fmt: skip
            layers = answers_found(model, asked)
            found.append({"task": kind, "length": length, "depth": depth, "layers": layers})
    return found


def losses(
    path: Path, options: argparse.Namespace, reader: Reader, tokenizer: Tokenizer,
    model: DeepSeekV4 | None, longest: int,
) -> dict[str, Any]:  # fmt: skip
    """Loss by position and of tails, where there are documents."""
    documents = read_documents(path, options.text, tokenizer)
    if not documents:
        return {"losses": "not measured: give documents by --text"}
    trained = options.train_length or trained_length(path)
    contexts = {} if model is None else {"window": model.config.sliding_window}
    if trained is not None:
        contexts["training_length"] = trained
    found: dict[str, Any] = {"positions": loss_by_position(reader, documents, longest)}
    if contexts:
        found["contexts"] = contexts
        found["tails"] = tail_losses(reader, documents, longest, contexts, options.tail)
    return found


def open_reader(
    path: Path, options: argparse.Namespace
) -> tuple[DeepSeekV4 | None, Reader, Tokenizer]:
    """Our model, or one of transformers, what reads it, and its tokenizer.

    Raises:
        UserError: it has no tokenizer, or cannot be read.
    """
    kind = foreign_kind(path)
    if kind is None:
        model, tokenizer = open_model(options)
        reader: Reader = CacheReader(model, options.chunk_tokens)
    else:
        if options.quant:
            raise UserError(f"--quant {options.quant}: {path} is a {kind} of transformers")
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - only for its models

        try:
            other: Any = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{path} cannot be read by transformers: {one_line(error)}") from error
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        other = other.to("cuda" if on_gpu else "cpu", dtype).eval()
        model, reader, tokenizer = None, TransformersReader(other), folder_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer.json, with which probes are written")
    return model, reader, tokenizer


def foreign_kind(path: Path) -> str | None:
    """``model_type`` of a folder that holds another model than DeepSeek-V4."""
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        kind = json.loads(file.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    return None if kind in (None, "deepseek_v4") else str(kind)


def read_documents(path: Path, texts: Sequence[Path], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of the texts; without texts the longest held-out documents of a run."""
    if texts:
        return tokenizer.encode_batch([_read_text(text) for text in texts])
    root = run_root(path)
    if root is None:
        return []
    run = read_run(root)
    loader = build_loader(run.data, tokenizer, run.seed, 1)
    return loader.validation_documents(_MOST_DOCUMENTS)


def trained_length(path: Path) -> int | None:
    """Tokens of the longest row that a run reaches; None where that is not known."""
    root = run_root(path)
    return None if root is None else resolve(read_run(root)).longest_row


def run_root(path: Path) -> Path | None:
    """The run folder of a run or of one of its checkpoints."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / CONFIG).is_file():
            return folder
    return None


def table(found: dict[str, dict[str, Any]]) -> str:
    """What a reader looks at first, a line a model and task."""
    lines = [f"{'model':20} {'task':10} {'within reach':>13} {'beyond reach':>13} {'chance':>8}"]
    for name, result in found.items():
        for task, parts in result["retrieval"].items():
            near, far = (
                f"{parts[part]['correct']:.3f}" if part in parts else "-"
                for part in ("within_reach", "beyond_reach")
            )
            chance = parts["all"]["chance"]
            lines.append(f"{name:20} {task:10} {near:>13} {far:>13} {chance:8.4f}")
        lines += _places(name, result.get("answers", []))
        tails = result.get("tails", {})
        if tails.get("documents") == 0:
            needed = f"a document of {tails['needs_tokens']} tokens (--text, --tail, --lengths)"
            lines.append(f"{name:20} last tokens: not measured, it needs {needed}")
        if tails.get("documents"):
            parts = [p for p in ("whole", "window", "training_length") if p in tails]
            told = "  ".join(f"{part} {tails[part]:.4f}" for part in parts)
            lines.append(f"{name:20} last {tails['tail']} tokens, nats per token: {told}")
    return "\n".join(lines)


def _places(name: str, answers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each task whether the layers looked at the far answer's place: at depth 0."""
    for told in answers:
        if told["depth"] == answers[0]["depth"]:
            parts = []
            for layer in told["layers"]:
                looked = layer["window"] + layer.get("entries", 0.0)
                chosen = f", chosen {layer['chosen']:.2f}" if "chosen" in layer else ""
                parts.append(f"{layer['kind']} {looked:.2f}{chosen}")
            shown = "; ".join(parts)
            yield f"{name:20} {told['task']:10} attention on the farthest answer: {shown}"


if __name__ == "__main__":
    sys.exit(main())
