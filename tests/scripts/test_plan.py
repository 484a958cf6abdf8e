"""``v4 plan``: what fits fits, days are FLOPs over the stated rate, and bad input is one line."""

import re

import pytest

from scripts.plan import main
from train.config.command_line import compose_run
from train.preflight.cards import CARDS, card
from train.preflight.forecast import duration, run_flops
from train.preflight.needs import Needs
from train.preflight.world import GB
from train.stages import resolve


def planned(capsys, line):
    assert main(line.split()) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "ranks", "memory"),
    [
        ("experiment=gpu_24gb --gpus 1 --memory 24", 1, 24),
        ("experiment=v4_flash --gpus 512 --memory 80", 512, 80),
        ("model=v4_small --gpus 6 --card l40s", 6, 48),
    ],
)
def test_layouts_that_are_named_fit_and_use_every_gpu(line, ranks, memory, capsys):
    text = planned(capsys, line)
    assert "computed from the config, not measured" in text
    run = compose_run([*line.split(" --")[0].split(), "train.precision=bf16"])
    needs = Needs(run, resolve(run))
    flags = re.findall(r"^  \w: (parallel.*)$", text, re.MULTILINE)
    totals = re.search(r"^total +(.*)$", text, re.MULTILINE)[1].replace(",", "").split()
    assert flags
    assert len(flags) == len(totals)
    for words, total in zip(flags, totals, strict=True):
        layout = compose_run(["model=v4_small", *words.split()]).parallel
        peak = needs.peak(layout.resolve(layout.world_size), "cuda").total
        assert float(total) == pytest.approx(peak / GB, abs=0.006)
        assert peak <= memory * GB
        assert layout.world_size == ranks or "the fewest such ranks that fit" in text


def test_what_does_not_fit_says_so_and_names_what_would(capsys):
    text = planned(capsys, "model=v4_small --gpus 1 --memory 8")
    assert "1 cuda rank(s) of 8 GB: none of 1 layouts fits; the closest:" in text
    assert re.search(r"the fewest such ranks that fit are [248]:", text)
    text = planned(capsys, "experiment=v4_flash --gpus 6 --memory 80")
    assert "its batches split over no layout of 6 ranks" in text
    assert "no number of such ranks is enough" in planned(capsys, "--gpus 1 --memory 0.5")


@pytest.mark.parametrize(("given", "share"), [("", 0.3), (" --share 0.5", 0.5)])
def test_time_is_flops_over_the_stated_share_of_the_peak(given, share, capsys):
    text = planned(capsys, f"model=v4_small --gpus 4 --card H100{given}")
    run = compose_run(["model=v4_small"])
    seconds = run_flops(run, resolve(run)) / (4 * 989e12 * share)
    assert f"at {share:.0%} of the peak rate" in text
    assert f"h100                          989 TFLOP/s each: {duration(seconds)} (" in text


def test_memory_alone_shows_every_card_that_has_it(capsys):
    text = planned(capsys, "model=v4_mini --gpus 1 --memory 24")
    shown = re.findall(r"^  (\S+) .*TFLOP/s each", text, re.MULTILINE)
    assert shown == [one.name for one in CARDS if one.memory_gb == 24]
    assert "no card of the table has 23 GB" in planned(capsys, "--gpus 1 --memory 23")


def test_this_machine_is_the_default(capsys):
    text = planned(capsys, "model=v4_tiny")
    assert "this machine (measured)" in text


@pytest.mark.parametrize("name", ["H100", "h-100", "NVIDIA H100", "A100_80"])
def test_cards_are_known_however_they_are_spelled(name):
    assert card(name).bf16_tflops in (989, 312)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--gpus 8", "--memory GB or --card NAME"),
        ("--card h10", "did you mean h100?"),
        ("--card nothing_like_it", "there are rtx3090"),
        ("--gpus 0 --memory 80", "--gpus 0 must be above 0"),
        ("--gpus 1 --memory 80 --share 2", "--share 2 must lie in (0, 1]"),
        ("--gpus 1 --card h100 --tflops 5", "--tflops 5.0 and --card h100: give one"),
        ("--gpus 1 --memory nan", "--memory nan must be finite"),
        ("modle=v4_tiny", "did you mean model?"),
    ],
)
def test_bad_input_is_one_line(line, says, capsys):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
