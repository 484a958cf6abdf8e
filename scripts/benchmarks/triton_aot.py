"""Compile every shipped Triton kernel for every GPU it is meant for, and hold it to their limits.

No GPU is needed. Compilers say nothing of a kernel that asks for more shared memory than there is,
that spills, whose warps compute one product several times, or that leaves products to plain
arithmetic; this does, with exit code 1. ``Shipped.spills`` and ``replicates`` give the exceptions.
With TRITON_CACHE_DIR set, only what has changed since is compiled again; ``--parse`` stops after
types and shapes, where most of what the interpreter lets pass fails already.

    python scripts/bench.py triton_aot
    python scripts/bench.py triton_aot --arch sm_86 sm_90 --kernel swiglu --markdown table.md
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from scripts.cli.command import command
from scripts.cli.outputs import check_output, write_json, write_text
from scripts.cli.parser import CommandParser
from train.errors import ROOT, ExitCode, UserError

KERNELS = ROOT / "model/kernels/triton"
# Bytes of shared memory that one program may have.
SHARED = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448,
    "sm_120": 101_376, "gfx942": 65_536,
}  # fmt: skip
TMEM = 512  # columns
MMA = r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma\w*)"


@dataclass
class Compiled:
    """What one kernel takes on one architecture.

    Attributes:
        module: file of the kernel.
        name: of the shipped line.
        arch: architecture.
        tile: its sizes, warps and stages.
        shared: bytes of shared memory.
        tmem: columns of tensor memory.
        registers: of a thread.
        spilled: bytes of a thread.
        replicated: how often the warps compute a product, for the worst one; 0: no product.
        mma: tensor core instructions.
        seconds: of the compilation.
        faults: why it cannot be shipped.
        passed: what is wrong with it and has a stated reason.
    """

    module: str
    name: str
    arch: str
    tile: str
    shared: int = 0
    tmem: int = 0
    registers: int = 0
    spilled: int = 0
    replicated: int = 0
    mma: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Parse the arguments, compile, print, write."""
    args = _arguments(words)
    if args.json:
        check_output("--json", Path(args.json), '"spilled"')
    if args.markdown:
        check_output("--markdown", Path(args.markdown), "scripts/bench.py triton_aot")
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it")
    lines: list[Compiled] = []
    with tempfile.TemporaryDirectory() as fresh:
        os.environ.setdefault("TRITON_CACHE_DIR", fresh)
        for module, shipped in shipped_kernels(args.kernel):
            for arch in args.arch:
                lines.append(compile_one(module, shipped, arch, args.parse))
                print(render(lines[-1]), flush=True)
    if args.json:
        write_json(Path(args.json), [asdict(line) for line in lines], indent=2)
    if args.markdown:
        shown = " ".join(["python scripts/bench.py triton_aot", *(words or sys.argv[1:])])
        write_text(Path(args.markdown), markdown(lines, shown))
    faulty = sum(bool(line.faults) for line in lines)
    print(f"{len(lines)} {'parsed' if args.parse else 'compiled'}, {faulty} with faults")
    return ExitCode.failure if faulty else ExitCode.finished


def shipped_kernels(wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(module, shipped line) of all kernels.

    Args:
        wanted: names of modules; none: all.

    Raises:
        UserError: a module that there is not.
    """
    names = sorted(path.stem for path in KERNELS.glob("*.py"))
    modules = [name for name in names if "\nSHIPPED" in (KERNELS / f"{name}.py").read_text()]
    for name in wanted:
        if name not in modules:
            raise UserError(f"--kernel {name} is none of {', '.join(modules)}")
    for name in wanted or modules:
        for shipped in import_module(f"model.kernels.triton.{name}").SHIPPED:
            yield name, shipped


def tile_text(tile: Any) -> str:
    """Sizes, warps and stages of a tile, as the table shows them."""
    sizes = " ".join(f"{name}={value}" for name, value in tile.sizes.items())
    return f"{sizes} w{tile.warps} s{tile.stages}".strip()


def compile_one(module: str, shipped: Any, arch: str, parse: bool = False) -> Compiled:
    """Compile a kernel with its tile for an architecture, and look at the result.

    Args:
        module: file of the kernel.
        shipped: the kernel's line, see ``model.kernels.triton.launch.Shipped``.
        arch: a key of ``SHARED``.
        parse: no more than types and shapes.
    """
    from model.kernels.triton.launch import tile_of  # noqa: PLC0415 (imports triton)

    tile = tile_of(shipped.tiles, arch)
    line = Compiled(module, shipped.name, arch, tile_text(tile))
    begin = time.perf_counter()
    try:
        kernel: Any = (_parse if parse else _compile)(shipped, tile, arch)
    except Exception as error:  # whatever the compiler raises is this line's fault
        line.faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")
        return line
    if parse:
        return line
    line.seconds = round(time.perf_counter() - begin, 1)
    line.shared, line.tmem = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0) or 0
    text = kernel.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    line.registers, line.spilled = (
        _amd_registers(text) if arch.startswith("gfx") else _nvidia_registers(kernel, arch)
    )
    found = re.findall(MMA, text)
    line.mma = {name: found.count(name) for name in sorted(set(found))}
    line.replicated = max(replications(kernel.asm["ttgir"]), default=0)
    judge(line, shipped, expected_mma(kernel.asm["ttir"], arch))
    return line


def expected_mma(ttir: str, arch: str) -> str:
    """How the tensor core instruction begins that a kernel must have; empty: it has no product.

    Products of fewer than 64 rows are too small for what sm_90 and sm_100 added.

    Args:
        ttir: the compiler's code before layouts are chosen.
        arch: a key of ``SHARED``.
    """
    rows = max(map(int, re.findall(r"tt\.dot .*-> tensor<(\d+)x", ttir)), default=0)
    if not rows:
        return ""
    if arch.startswith("gfx"):
        return "v_mfma"
    return {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(arch if rows >= 64 else "", "mma.sync")


def judge(line: Compiled, shipped: Any, expected: str = "") -> None:
    """Why a line cannot be shipped, into ``line.faults``; what has a reason, into ``line.passed``.

    Args:
        line: what was measured.
        shipped: gives the reasons.
        expected: how a tensor core instruction that must be there begins; empty: none must.
    """
    if line.shared > SHARED[line.arch]:
        line.faults.append(f"shared {line.shared} > {SHARED[line.arch]}")
    if line.tmem > TMEM:
        line.faults.append(f"tmem {line.tmem} > {TMEM}")
    if expected and not any(name.startswith(expected) for name in line.mma):
        line.faults.append(f"no {expected} instruction")
    for found, text, reasons in (
        (line.spilled > 0, f"spills {line.spilled} bytes", shipped.spills),
        (line.replicated > 1, f"warps compute one product {line.replicated} times",
         shipped.replicates),
    ):  # fmt: skip
        if found and line.arch in reasons:
            line.passed.append(f"{text}: {reasons[line.arch]}")
        elif found:
            line.faults.append(f"{text} without a stated reason")


def _compile(shipped: Any, tile: Any, arch: str) -> Any:
    import triton  # noqa: PLC0415 (after the environment is set)

    source, target, options = _source(shipped, tile, arch)
    with contextlib.redirect_stdout(io.StringIO()):  # an error of ptxas prints the whole PTX
        return triton.compile(source, target=target, options=options)


def _parse(shipped: Any, tile: Any, arch: str) -> None:
    """What :func:`_compile` begins with: types and shapes, which the interpreter does not check."""
    from triton._C.libtriton import ir  # noqa: PLC0415
    from triton.compiler.compiler import make_backend  # noqa: PLC0415

    source, target, given = _source(shipped, tile, arch)
    backend: Any = make_backend(target)
    context = ir.context()
    options = backend.parse_options(given)
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source.make_ir(target, options, functions, backend.get_module_map(), context)


def _source(shipped: Any, tile: Any, arch: str) -> tuple[Any, Any, dict[str, Any]]:
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    names = shipped.kernel.arg_names
    constants = {**shipped.constants, **tile.sizes}
    unknown = [n for n in names if n not in shipped.types and n not in constants]
    assert not unknown, f"Shipped {shipped.name!r} gives neither type nor value of {unknown}"
    kinds = {n: kind for n, kind in shipped.types.items() if n in names and n not in constants}
    types = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    divisible = [n for n, kind in kinds.items() if kind[0] == "*" or kind.endswith(":16")]
    source = ASTSource(
        fn=shipped.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(n),): v for n, v in constants.items() if n in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch[3:]), 32)
    return source, target, {"num_warps": tile.warps, "num_stages": tile.stages, **tile.options}


def _nvidia_registers(kernel: Any, arch: str) -> tuple[int, int]:
    """(registers, spilled bytes), as ptxas tells them for this PTX."""
    import triton.backends.nvidia as nvidia  # noqa: PLC0415

    tool = "ptxas-blackwell" if int(arch[3:]) >= 100 else "ptxas"
    suffix = "a" if int(arch[3:]) >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        compiler = Path(next(iter(nvidia.__path__)), "bin", tool)
        words = [compiler, "-v", f"--gpu-name={arch}{suffix}", ptx, "-o", f"{folder}/cubin"]
        told = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, check=True
        ).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", told),
        re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told),
    )
    assert registers, told
    return int(registers[1]), max(map(int, spilled.groups())) if spilled else 0


def _amd_registers(text: str) -> tuple[int, int]:
    """(vector registers, accumulators included; spilled bytes) of the code's own notes."""
    count, spills = (
        re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")
    )
    assert count, "no register count"
    assert spills, "no spill count"
    return int(count[1]), 4 * int(spills[1])


def replications(ttgir: str) -> list[int]:
    """For each matrix product, how many warps compute the same part of it.

    A product whose result feeds another product has its warps along one axis; where that is shorter
    than warps times instruction, they repeat each other, and nothing warns.

    Args:
        ttgir: the compiler's code once layouts are chosen.
    """
    layouts = {}
    for name, body in re.findall(r"(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma)<\{(.*)\}>", ttgir):
        warps, shape = (
            re.search(rf"{key} = \[([\d, ]+)\]", body) for key in ("warpsPerCTA", "instrShape")
        )
        if warps and shape:
            layouts[name] = [[int(n) for n in m[1].split(",")[:2]] for m in (warps, shape)]
    pattern = r"= (?:ttng\.warp_group_dot |tt\.dot ).*-> tensor<(\d+)x(\d+)xf32, (#\w+)>"
    found = []
    for rows, cols, name in re.findall(pattern, ttgir):
        if name in layouts:
            warps, shape = layouts[name]
            covers = [w * s // int(n) for w, s, n in zip(warps, shape, (rows, cols), strict=True)]
            found.append(max(1, covers[0]) * max(1, covers[1]))
    return found


def render(line: Compiled) -> str:
    """One line of text."""
    end = f"  FAULT: {'; '.join(line.faults)}" if line.faults else ""
    return (
        f"{line.module + ' ' + line.name:40} {line.arch:7} {line.tile:34} shared {line.shared:6}"
        f" tmem {line.tmem:3} registers {line.registers:3} spilled {line.spilled:4}"
        f" replicated {line.replicated} {line.mma}{end}"
    )


def markdown(lines: Sequence[Compiled], shown: str) -> str:
    """The table as a document.

    Args:
        lines: compiled kernels.
        shown: the command that made it.
    """
    head = ("kernel", "architecture", "tile", "shared bytes (limit)", "TMEM columns", "registers",
            "spilled bytes", "product computed", "tensor core instructions",
            "faults or reasons")  # fmt: skip
    rows = [
        (f"{x.module} {x.name}", x.arch, x.tile, f"{x.shared:,} ({SHARED[x.arch]:,})", x.tmem or "",
         x.registers, x.spilled, f"{x.replicated} x" if x.replicated else "",
         ", ".join(f"{name} {count}" for name, count in x.mma.items()),
         "; ".join(x.faults + x.passed))
        for x in lines
    ]  # fmt: skip
    table = [head, ["---"] * len(head), *rows]
    return "\n".join(
        [
            "# Triton kernels, compiled ahead of time",
            "",
            f"Made by `{shown}`; no GPU ran anything. Limits and columns: `scripts/benchmarks/"
            "triton_aot.py`.",
            "",
            *("| " + " | ".join(map(str, row)) + " |" for row in table),
            "",
        ]
    )


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--arch", nargs="+", choices=list(SHARED), default=list(SHARED), help="default: all"
    )
    parser.add_argument("--kernel", nargs="+", default=[], help="files of kernels (default: all)")
    parser.add_argument(
        "--parse", action="store_true", help="only types and shapes: seconds, no figures"
    )
    parser.add_argument("--json", default="", help="also write the table to this file")
    parser.add_argument("--markdown", default="", help="also write the table as a document")
    return parser.parse_args(words)
