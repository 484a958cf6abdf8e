"""What every command has in common when it is asked what it takes, and when nobody reads on."""

import argparse
import gc
import os
import sys
from importlib import import_module

import pytest

from scripts.__main__ import COMMANDS, MEANT
from scripts.__main__ import main as v4
from scripts.bench import BENCHMARKS
from scripts.cli.parser import CommandParser

COMMANDS_OF_WORDS = {"pretrain", "bench"}  # take no options of their own
PARSED = {n: m for n, m in {**COMMANDS, **BENCHMARKS}.items() if n not in COMMANDS_OF_WORDS}
HELP = [["--help"], *([name, "--help"] for name in COMMANDS)]
HELP += [["bench", name, "--help"] for name in BENCHMARKS]


@pytest.fixture
def parsers(monkeypatch):
    """Every parser that is made meanwhile."""
    made = []
    before = argparse.ArgumentParser.__init__

    def init(self, *args, **kwargs):
        made.append(self)
        before(self, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", init)
    return made


def tells(parser, action):
    """Whether the help of an option says its default."""
    default = action.default
    if default in (None, "", [], argparse.SUPPRESS) or default is False or action.required:
        return True
    several = isinstance(default, list | tuple)
    shown = " ".join(map(str, default)) if several else str(default)
    return bool(action.help) and shown in parser._get_formatter()._expand_help(action)


@pytest.mark.parametrize("name", list(PARSED))
def test_help_of_every_option_tells_its_default_and_numbers_have_a_range(name, parsers, capsys):
    with pytest.raises(SystemExit):
        import_module(PARSED[name]).main(["--help"])
    assert "usage" in capsys.readouterr().out
    parsers = [parser for parser in parsers if parser.description != "Hydra"]  # reads YAML there
    assert parsers
    for parser in parsers:
        assert isinstance(parser, CommandParser), name
        for action in parser._actions:
            what = f"{name}: {action.option_strings or action.dest}"
            assert tells(parser, action), what
            assert action.type not in (int, float), f"{what} has no range (scripts/cli/parser.py)"


def ended_unread(words):
    """Exit code and errors of ``v4 WORDS``, as a process whose reader has left (``| head -0``)."""
    errors, into_errors = os.pipe()
    child = os.fork()
    if child == 0:
        gc.disable()  # garbage of earlier tests may belong to threads that a fork does not have
        unread, out = os.pipe()
        os.close(unread)
        os.dup2(out, 1)
        os.dup2(into_errors, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w") for n in (1, 2))
        code = 99
        try:
            code = v4(words)
            sys.stdout.flush()  # what the interpreter does at its end
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(code)
    os.close(into_errors)
    with os.fdopen(errors) as file:
        told = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_nothing_is_said_where_nobody_reads(words):
    assert ended_unread(words) == (1, "")


@pytest.mark.parametrize("word", MEANT)
def test_a_word_that_people_type_names_the_command(word, capsys):
    assert word not in COMMANDS
    assert MEANT[word].split()[0] in COMMANDS
    assert v4([word, "runs/x"]) == 2
    told = f"error: v4 has no command {word}: did you mean v4 {MEANT[word]}?\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("words", [[], ["bench"], ["report"], ["pretrain"], ["study"]])
@pytest.mark.parametrize("flag", ["--help=foo", "-h=3"])
def test_a_flag_with_a_value_that_it_does_not_take_is_one_line(words, flag, capsys):
    assert v4([*words, flag]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "__help" not in told
    assert flag.partition("=")[0] in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["report", ""], "'' names no run"),
        (["watch", ""], "run '' names no file or folder"),
        (["report", "study=aa", "lr=3"], "study=aa: unknown config key lr=3: the config has"),
        (["report", "study=aa", "optim.lr=3"], "study=aa: optim.lr=3 is a key of its runs: give"),
        (["report", "study=aa", "seeds=3"], "study=aa: seeds=3 must be a list"),
        (["report", "study=aa", "steps=1,2"], "steps=1,2: one value a key"),
        (["report", "study=aa", "step"], "study=aa: cannot read 'step': give KEY=VALUE"),
        (["study", "study=aa", "stepz=3"], "study=aa: unknown config key stepz=3: did you mean"),
    ],
    ids=str,
)  # fmt: skip
def test_a_word_that_names_nothing_is_told_in_our_words(words, says, capsys):
    assert v4(words) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert "object_type" not in told
