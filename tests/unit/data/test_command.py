"""lctrain data, as typed."""

import pytest

from lctrain.cli import main


def run(capsys, *args):
    status = main(["data", *args])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / "b.txt").write_text("second document\n")
    return tmp_path


def test_prepare_info_show(texts, capsys):
    prefix = str(texts / "corpus")
    status, out, _ = run(capsys, "prepare", f"input=[{texts}/a.txt,{texts}/b.txt]", f"output={prefix}", "workers=1")
    assert status == 0
    assert "2 documents, 5,018 tokens, vocabulary 257" in out
    status, out, _ = run(capsys, "info", f"prefix={prefix}")
    assert status == 0
    rows = {line.split("  ")[0]: line.split()[-1] for line in out.splitlines()}
    assert rows["documents"] == "2"
    assert rows["tokens, longest"] == "5,001"
    assert [line.split() for line in out.splitlines()[-4:-2]] == [["1,024", "1", "99.7%"], ["4,096", "1", "99.7%"]]
    assert run(capsys, "show", f"prefix={prefix}", "document=1") == (0, "second document\n", "")
    assert run(capsys, "show", f"prefix={prefix}", "document=1", "start=7", "tokens=3") == (0, "doc\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["show", "prefix=PREFIX", "document=2"], "document=2: corpus"),
        (["show", "prefix=nowhere"], "does not exist"),
        (["info", "prefix=nowhere"], "does not exist"),
        (["prepare", "input=nowhere", "output=PREFIX2"], "'nowhere' does not exist"),
        (["prepare", "input=TEXT", "output=PREFIX"], "overwrite=true"),
        (["prepare", "input=TEXT", "output=PREFIX2", "worker=2"], "workers"),
        (["prepare", "output=PREFIX2"], "input"),
        (["shwo"], "show"),
    ],
)
def test_mistakes_are_one_line(texts, capsys, args, message):
    prefix = str(texts / "corpus")
    run(capsys, "prepare", f"input={texts}", f"output={prefix}", "workers=1")
    names = {"PREFIX2": f"{prefix}2", "PREFIX": prefix, "TEXT": str(texts)}
    for short, long in names.items():
        args = [arg.replace(short, long) if arg.endswith(short) else arg for arg in args]
    status, _, err = run(capsys, *args)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert message in err


def test_show_without_sidecar_asks_for_the_tokenizer(corpus, capsys):
    prefix = corpus([90], sidecar=False)
    status, _, err = run(capsys, "show", f"prefix={prefix}")
    assert status == 2
    assert "add tokenizer=" in err
    status, out, _ = run(capsys, "show", f"prefix={prefix}", "tokenizer=bytes", "start=65", "tokens=3")
    assert (status, out) == (0, "ABC\n")
    assert "unknown" in run(capsys, "info", f"prefix={prefix}")[1]
