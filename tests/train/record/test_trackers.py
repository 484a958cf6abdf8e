"""What the user sees while a run goes on."""

import logging
import signal
import time

import pytest
import torch

from data.tokenizer import ByteTokenizer
from parallel.engine import TorchEngine
from tests.helpers import small_model
from train import build
from train.config.schema import Precision
from train.display.console import Console
from train.preflight import matmul_rate
from train.preflight.matmul_rate import measured_matmul_rate
from train.record.continuation import continue_text
from train.recovery.stop import StopRequest


def record(step, **values):
    return {"step": step, "loss": 1.5, "lr": 1e-3, "tokens_per_second": 1e4, **values}


def test_lines_come_every_few_steps_and_at_evaluations(caplog):
    console = Console(steps=20, done=4, every=5, bar=False)
    with caplog.at_level(logging.INFO):
        for step in range(5, 21):
            console.show(record(step, **({"val_loss": 2.0} if step == 7 else {})))
    shown = [message.split(" loss")[0] for message in caplog.messages]
    assert shown == ["step 5/20", "step 7/20", "step 10/20", "step 15/20", "step 20/20"]
    assert "val_loss 2" in caplog.messages[1]
    assert "left 0:00" in caplog.messages[-1]


def test_bar_moves_on_a_terminal(capsys):
    console = Console(steps=3, done=1, every=1, bar=True)
    console.show(record(2))
    console.show(record(3))
    console.close()
    assert "3/3" in capsys.readouterr().err


def test_signal_asks_to_stop_and_the_second_interrupt_acts():
    handler = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.reason == ""
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_time_limit_is_a_reason():
    stop = StopRequest(0.02)
    assert stop.reason == ""
    time.sleep(0.03)
    assert stop.reason == "the time limit"
    assert StopRequest(0).reason == ""


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sample_is_the_models_and_repeatable(temperature):
    model, tokenizer = small_model(vocab_size=260), ByteTokenizer()
    ask = (model, tokenizer, "the ", 6, temperature, 3, torch.device("cpu"))
    text = continue_text(*ask)
    assert text.startswith("the ")
    assert text == continue_text(*ask)
    if temperature == 0:
        ids = tokenizer.encode("the ")
        for _ in range(6):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
        assert text == "the " + tokenizer.decode(ids[4:])


def test_matmul_rate_is_positive():
    rate = measured_matmul_rate(torch.device("cpu"), torch.float32, size=64, seconds=0.0)
    assert rate.peak >= rate.usual > 1e6


@pytest.mark.parametrize(("free", "told"), [(1, True), (14, False)])
def test_matmul_rate_is_that_of_the_idle_machine_and_load_shows(free, told, monkeypatch):
    """Of 30 products on a machine of 100 GFLOP/s all but ``free`` share their cores with others."""
    taken = iter(range(1000))
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def timed(x, _):
        return 2 * len(x) ** 3 / 100e9 * (1 if next(taken) % 30 >= 30 - 2 * free else 3)

    monkeypatch.setattr(matmul_rate, "_timed", timed)
    flops = 2 * (128**3 + 64**3)
    measure = measured_matmul_rate.__wrapped__  # without what was measured before
    device = torch.device("cpu")
    found = measure(device, torch.float32, 128, 0.999 * (3 * (15 - free) + free) * flops / 100e9)
    assert found[:2] == pytest.approx((100e9, 100e9 if free > 7 else 100e9 / 3))
    line = "the best matmul made 100 GFLOP/s, of which mfu is told, and was 3.0 times as fast"
    assert (line in found.under_load()) is told


def test_matmul_rates_of_ranks_that_share_cores_add_up_to_the_machine(monkeypatch):
    """Of two ranks each gets half of the cores, but all of them after a pause; caches help small
    products threefold."""
    rested = []
    monkeypatch.setattr(time, "sleep", lambda _: rested.append(True))

    def timed(x, _):
        alone, small = rested and rested.pop(), len(x) < 128
        return 2 * len(x) ** 3 / (100e9 if alone else 50e9) / (3 if small else 1)

    monkeypatch.setattr(matmul_rate, "_timed", timed)
    measure = measured_matmul_rate.__wrapped__
    device = torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert measure(device, torch.float32, 128, 1e-3) == pytest.approx((50e9, 50e9, 1))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert not measure(device, torch.float32, 128, 1e-3).under_load(), "sizes differ: no load"


@pytest.mark.parametrize(("slower", "said"), [(187.0, True), (0.6, False)])
def test_emulated_precision_is_said(monkeypatch, caplog, slower, said):
    """The measured ratio is planted: machines differ in it."""
    monkeypatch.setattr(build, "times_slower_than_fp32", lambda *_: slower)
    engine = TorchEngine(torch.nn.Linear(1, 1), None, torch.device("cpu"), 0.0)
    build.warn_of_emulation(Precision.bf16, engine)
    assert ("bf16: this CPU multiplies such matrices 187 times slower" in caplog.text) is said
    caplog.clear()
    build.warn_of_emulation(Precision.fp32, engine)
    assert caplog.text == ""
