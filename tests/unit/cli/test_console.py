"""Away from a terminal, output is plain lines that neither wrap nor interpret what they print."""

from lctrain import console


def test_table_is_aligned_and_never_cut(capsys):
    long = "x" * 300
    console.table(("name", "value"), [("a", 1), (long, 23)], title="Title", align="lr")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Title"
    assert lines[2] == "a" + " " * 299 + "  " + "    1"
    assert lines[3] == long + "     23"


def test_empty_table(capsys):
    console.table(("name", "value"), [])
    assert capsys.readouterr().out == "name  value\n"


def test_say_prints_brackets_as_they_are(capsys):
    console.say("[bold]a[/bold] " + "b" * 200)
    assert capsys.readouterr().out == "[bold]a[/bold] " + "b" * 200 + "\n"


def test_progress_reports_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 13.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("reading", total=4) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().out == "reading: 50%, 12 s left\nreading: done in 13.0 s\n"
