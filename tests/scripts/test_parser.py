"""What a command line of a script cannot be is told in our words, all of it at once."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from scripts.cli.parser import CommandParser, real, whole
from tests.scripts.test_help import PARSED
from train.errors import UserError

pytestmark = pytest.mark.core


def parser():
    p = CommandParser(prog="v4 paint", beyond="--out {}")
    p.add_argument("wall")
    p.add_argument("--coats", type=whole(least=1), default=2)
    p.add_argument("--width", type=real(above=0, most=9))
    p.add_argument("--colour", choices=["red", "blue"], default="red")
    p.add_argument("--out")
    p.add_argument("--number", type=int)
    group = p.add_mutually_exclusive_group()
    group.add_argument("--wet", action="store_true")
    group.add_argument("--dry", action="store_true")
    return p


FORM = "it is v4 paint WALL [OPTIONS], and --help tells more"


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        ("north --coats 0", ["--coats 0 must be 1 or more"]),
        ("north --coats x", ["--coats x must be a whole number"]),
        ("north --width nan", ["--width nan must be finite in fp32"]),
        ("north --width=9.5", ["--width 9.5 must lie in (0, 9]"]),
        ("north --number 1.5", ["--number 1.5 must be a whole number"]),
        ("north --colour reed", ["--colour reed is none that it takes: did you mean red?"]),
        ("north --colour 7", ["--colour 7 is none that it takes: there are red, blue"]),
        ("north --color red", ["--color is no option of v4 paint: did you mean --colour?"]),
        ("--zzz north", ["--zzz is no option of v4 paint"]),
        ("north --zzz 3", ["--zzz is no option of v4 paint"]),
        ("north --out", ["--out needs a value"]),
        ("north --out --wet", ["--out needs a value"]),
        ("north --wet=3", [f"--wet takes no value, got '3'; {FORM}"]),
        ("north --wet --dry", [f"--dry and --wet: give one of them; {FORM}"]),
        ("north --co 3", [f"--co may be --coats, --colour: write more of it; {FORM}"]),
        ("", [f"wall: not given; {FORM}"]),
        ("north south", [f"south: more than it takes (give --out south); {FORM}"]),
        (
            "north --coats 0 --width -1 --color red --out",
            ["--color is no option of v4 paint: did you mean --colour?", "--out needs a value",
             "--coats 0 must be 1 or more", "--width -1 must lie in (0, 9]"],
        ),
        ("--coats 0", ["--coats 0 must be 1 or more", f"wall: not given; {FORM}"]),
    ],
)  # fmt: skip
def test_each_problem_is_a_line_of_our_own(words, problems):
    with pytest.raises(UserError) as told:
        parser().parse_args(words.split())
    assert list(told.value.args) == problems


def test_a_text_in_a_paths_place_is_told_and_not_looked_up():
    p = CommandParser(prog="v4 paint")
    p.add_argument("wall", type=Path)
    long = "Once upon a time, " * 20
    with pytest.raises(UserError, match=r"wall Once upon .* is no path: it has a name of over 255"):
        p.parse_args([long])
    assert p.parse_args([f"a/{long[:200]}"]).wall == Path(f"a/{long[:200]}")


def test_what_is_right_is_read():
    options = parser().parse_args("north --coats=3 --wi 2 --out -".split())
    assert (options.wall, options.coats, options.width, options.out) == ("north", 3, 2.0, "-")
    options = parser().parse_args(["north", "--out=-x", "--number", "-4"])
    assert (options.out, options.number) == ("-x", -4)


def test_checks_of_the_options_are_made_beside_those_of_each_type():
    def no_north(options):
        raise UserError(f"{options.wall} has no wall, {options.coats} coats, {options.refused}")

    def trips(options):
        return 1 / options.width

    with pytest.raises(UserError) as told:
        parser().read(["north", "--coats", "none"], no_north, trips)
    assert list(told.value.args) == [
        "--coats none must be a whole number", "north has no wall, 2 coats, {'coats'}",
    ]  # fmt: skip
    assert parser().read(["north"], lambda options: None).coats == 2


def test_a_sub_command_is_read_alike():
    p = CommandParser(prog="v4 wall")
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("build").add_argument("--height", type=whole(least=1))
    for words, told in (
        ([], "COMMAND: not given; it is v4 wall COMMAND [OPTIONS]"),
        (["bild"], "v4 wall has no command bild: did you mean build?"),
        (
            ["build", "--hight", "3"],
            "--hight is no option of v4 wall build: did you mean",
        ),
        (["build", "--height", "0"], "--height 0 must be 1 or more"),
        (["build", "x"], "x: more than it takes"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            p.parse_args(words)
    assert p.parse_args(["build", "--height", "2"]).height == 2


@pytest.mark.parametrize("name", list(PARSED))
def test_every_command_tells_of_an_option_that_it_has_not_in_one_line_and_ends_with_2(name, capsys):
    words = ["list"] if name == "checkpoints" else []
    assert import_module(PARSED[name]).main([*words, "--no-such-option"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert lines[0].startswith("error: --no-such-option is no option of ")
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) <= 2  # what it needs besides
