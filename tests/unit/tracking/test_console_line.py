"""What a person sees of a step."""

import io

import pytest
from rich.console import Console

from lctrain.tracking.console_line import ConsoleLine, format_duration, format_line

RECORD = {
    "step": 7,
    "loss": 2.34567,
    "grad_norm": 1.2345,
    "lr": 3e-4,
    "tokens_per_s": 12345.6,
    "mfu": 0.4321,
    "memory_mb": 2048.0,
    "data_wait_s": 0.0021,
    "unknown": 1,
}


def test_line_has_what_the_record_has():
    assert format_line(RECORD, 100, "1:05") == (
        "step   7/100  loss 2.3457  grad 1.23  lr 3.00e-04  12,346 tok/s  mfu 43.2%  2.0 GB  data 2 ms  left 1:05"
    )
    assert format_line({"step": 7}, 9, "0 s") == "step 7/9  left 0 s"
    assert format_line({"step": 7, "recall": -0.0004}, 9, "0 s") == "step 7/9  recall 0.0%  left 0 s"
    line = format_line({"step": 7, "loss": float("nan"), "skipped": True, "eval_loss": 1.5, "memory_mb": 300}, 9, "0 s")
    assert line == "step 7/9  loss nan  eval 1.5000  300 MB  SKIPPED  left 0 s"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (754, "12:34"), (11100, "3:05:00")])
def test_duration(seconds, text):
    assert format_duration(seconds) == text


def test_plain_lines_are_neither_wrapped_nor_coloured(capsys):
    line = ConsoleLine(3, every=2, start_step=0, console=Console(width=20))
    for step in (1, 2, 3):
        line.step({**RECORD, "step": step})
    line.message("note: [bold]100%[/bold]")
    line.close()
    shown = capsys.readouterr().out.splitlines()
    assert [text.split("  ")[0] for text in shown] == ["step 2/3", "step 3/3", "note: [bold]100%[/bold]"]
    assert "\x1b" not in "".join(shown)
    assert shown[1].endswith("left 0 s")


@pytest.mark.parametrize("reason", [{"eval_loss": 1.0}, {"skipped": True}])
def test_steps_that_matter_are_shown_between_the_others(capsys, reason):
    line = ConsoleLine(100, every=50, start_step=0, console=Console())
    line.step({"step": 1})
    line.step({"step": 2, **reason})
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_terminal_gets_a_bar_below_the_lines():
    screen = io.StringIO()
    line = ConsoleLine(4, every=1, start_step=2, console=Console(file=screen, force_terminal=True, width=80, highlight=False))
    line.step({"step": 3, "loss": 1.0})
    line.close()
    shown = screen.getvalue()
    assert "loss 1.0000" in shown
    assert "3/4" in shown
    assert "\x1b[?25h" in shown  # the cursor is visible again


def test_closed_terminal_does_not_end_the_training(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Closed())
    line = ConsoleLine(4, every=1, start_step=0, console=Console())
    line.step({"step": 1})
    line.step({"step": 2})
    line.message("anybody there?")
    line.close()
    print("also prints of others are harmless")


def test_time_left_follows_the_recent_pace(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    line = ConsoleLine(100, every=1, start_step=10, console=Console())
    for step, seconds in ((11, 100), (12, 10), *((step, 1) for step in range(13, 81))):
        now[0] += seconds
        line.step({"step": step})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("left 2:28:20")  # 100 s for each of 89 steps
    assert shown[-1].endswith("left 20 s")
