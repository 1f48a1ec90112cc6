"""Files to corpora: formats, order, limits, interruption."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lctrain.data import encode, readers
from lctrain.data import prepare as prepare_module
from lctrain.data.indexed import IndexedDataset
from lctrain.data.prepare import ensure_corpora, prepare
from lctrain.data.tokenizers import load_tokenizer
from lctrain.errors import UserError


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 64 bytes, so that small files go the road of large ones."""
    monkeypatch.setattr(readers, "PART", 64)
    monkeypatch.setattr(encode, "PART", 64)


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out" / "corpus")


def texts(prefix, tokenizer="bytes"):
    """Every document as text; checks that each ends with the end-of-document token and has no other."""
    data, loaded = IndexedDataset(prefix), load_tokenizer(tokenizer)
    found = []
    for number in range(len(data)):
        ids = data.document(number)
        assert ids[-1] == loaded.eod
        assert (ids[:-1] != loaded.eod).all()
        found.append(loaded.decode(ids))
    return found


def tree(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def test_a_folder_means_the_text_below_it(tmp_path, out):
    folder = tree(
        tmp_path / "in",
        {
            "b.txt": "second",
            "a/deep.md": "first",
            "c.txt.gz": gzip.compress("third ü".encode()),
            "d.jsonl": '{"text": "fourth"}\n\n{"text": "fifth"}\n',
            "empty.txt": "",
            ".hidden": "no",
            ".git/x": "no",
            "__pycache__/x": "no",
            "zero.dat": b"no\0no",
            "noise.dat": bytes(range(128, 256)) * 20,
            "image.gz": gzip.compress(b"\0\1\2"),
        },
    )
    made = prepare([folder], out)
    assert texts(out) == ["second", "third ü", "fourth", "fifth", "first"]
    assert (made.documents, made.skipped, made.max_id) == (5, 1, 256)
    assert json.loads(Path(f"{out}.json").read_text())["tokens"] == made.tokens == IndexedDataset(out).tokens
    assert sorted(p.name for p in Path(out).parent.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_globs_lists_and_files_named_twice(tmp_path, out):
    folder = tree(tmp_path / "in", {"b.txt": "b", "a.txt": "a", "c.dat": "c"})
    prepare([f"{folder}/b.txt", f"{folder}/*.txt", f"{folder}/**/c.*"], out)
    assert texts(out) == ["b", "a", "c"]


def test_preparing_into_the_input_folder_again_does_not_read_the_output(tmp_path):
    folder = tree(tmp_path / "in", {"a.txt": "a"})
    for overwrite in (False, True):
        assert prepare([folder], f"{folder}/corpus", overwrite=overwrite).documents == 1


def test_fasta_records_are_documents(tmp_path, out, small_parts):
    sequence = "ACGT" * 50
    lines = "\n".join(sequence[i : i + 60] for i in range(0, 200, 60))
    fasta = f">one length=200 > more\n{lines}\n>empty\n>two\r\nNNacgt\r\n>three\nA"
    tree(tmp_path, {"g.fna": fasta, "g.fa.gz": gzip.compress(fasta.encode())})
    made = prepare([str(tmp_path / "g.fna"), str(tmp_path / "g.fa.gz")], out, "dna")
    assert texts(out, "dna") == [sequence, "NNACGT", "A"] * 2
    assert made.skipped == 2
    prepare([str(tmp_path / "g.fna")], f"{out}2")
    assert texts(f"{out}2") == [sequence, "NNacgt", "A"]


def test_jsonl_lines_longer_than_a_part(tmp_path, out, small_parts):
    documents = ["short", "ü" * 500, "", "x" * 63, "last\nwith break"]
    tree(tmp_path, {"d.jsonl": "\n".join(json.dumps({"n": 1, "body": text}) for text in documents)})
    made = prepare([str(tmp_path / "d.jsonl")], out, text_key="body")
    assert texts(out) == [text for text in documents if text]
    assert made.skipped == 1


@pytest.mark.parametrize("text", ["words and\nlines " * 100, "ü" * 1000, "x" * 64, "x" * 65, "x" * 128, "\n" * 200, "a"])
def test_large_texts_are_cut_and_joined(tmp_path, out, small_parts, text):
    tree(tmp_path, {"t.txt": text})
    prepare([str(tmp_path / "t.txt")], out)
    assert texts(out) == [text]


def test_cuts_keep_lines_words_and_characters_whole(small_parts):
    def cuts(text):
        rest, parts = text.encode(), []
        while rest:
            part, rest = readers.cut_text(rest)
            parts.append(part.decode())  # fails inside a character
        assert all(len(part.encode()) <= 64 for part in parts)
        return parts

    assert all(part.endswith("\n") for part in cuts("a line of words\n" * 50))
    assert all(part.endswith(" ") for part in cuts("word " * 100))
    assert len(cuts("x" + "\U0001f40d" * 100)) > 6


@pytest.mark.parametrize("tokenizer", ["bytes", "dna"])
def test_the_corpus_does_not_depend_on_workers(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "PART", 4096)
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT\n", np.uint8)
    folder = tree(
        tmp_path / "in",
        {f"{n}.txt": letters[rng.integers(0, 5, int(size))].tobytes() for n, size in enumerate(rng.integers(0, 9000, 60))},
    )
    made = [prepare([folder], str(tmp_path / f"w{workers}"), tokenizer, workers) for workers in (1, 3)]
    assert made[0] == made[1]
    for ending in ("bin", "idx", "json"):
        assert (tmp_path / f"w1.{ending}").read_bytes() == (tmp_path / f"w3.{ending}").read_bytes()


def test_python_means_the_installation():
    from lctrain.data.inputs import find_files

    files = find_files(["python:"])
    names = {str(file) for file in files}
    assert os.__file__ in names
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert sum(file.stat().st_size for file in files) > 2_000_000


def test_mistakes_are_named(tmp_path, out):
    folder = tree(
        tmp_path / "in",
        {
            "bad.jsonl": '{"text": "a"}\n{"text": \n',
            "key.jsonl": '{"body": "a", "id": 1}\n',
            "list.jsonl": "[1]\n",
            "prose.txt": "Hello",
            "not.fa": "hello",
            "cut.txt.gz": gzip.compress(bytes(range(256)) * 1000)[:-500],
            "plain.txt.gz": "no gzip",
            "void/empty.txt": "",
            "binary/zero": b"\0\0",
        },
    )
    for name, tokenizer, message in [
        ("bad.jsonl", "bytes", r"bad\.jsonl, line 2: not JSON"),
        ("key.jsonl", "bytes", r"key\.jsonl, line 1: no text under the key 'text' \(its keys are 'body', 'id'\); set text_key"),
        ("list.jsonl", "bytes", "it is no JSON object"),
        ("prose.txt", "dna", r"prose\.txt: 'e' is not a nucleotide"),
        ("not.fa", "dna", r"not\.fa is not FASTA"),
        ("cut.txt.gz", "bytes", r"cut\.txt\.gz cannot be read"),
        ("plain.txt.gz", "bytes", r"plain\.txt\.gz cannot be read"),
        ("void", "bytes", "has no text: 1 files, all empty"),
        ("binary", "bytes", "holds no text file"),
        ("nowhere", "bytes", "does not exist and matches no file"),
        ("*.nope", "bytes", "does not exist and matches no file"),
        ("prose.txt", "nope.json", "tokenizer 'nope.json' cannot be read"),
    ]:
        for workers in (1, 2):
            with pytest.raises(UserError, match=message) as caught:
                prepare([f"{folder}/{name}"], out, tokenizer, workers)
            assert "\n" not in str(caught.value)
    assert not Path(out).parent.exists() or list(Path(out).parent.iterdir()) == []


def test_existing_output_is_kept_unless_told_otherwise(tmp_path, out):
    folder = tree(tmp_path / "in", {"a.txt": "old"})
    prepare([folder], out)
    tree(tmp_path / "in", {"a.txt": "new"})
    with pytest.raises(UserError, match=r"exists already.*overwrite=true"):
        prepare([folder], out)
    assert texts(out) == ["old"]
    prepare([folder], out, overwrite=True)
    assert texts(out) == ["new"]


def test_places_that_cannot_be_written_or_are_too_small(tmp_path, out, monkeypatch):
    folder = tree(tmp_path / "in", {"a.txt": "text"})
    with pytest.raises(UserError, match="cannot be written"):
        prepare([folder], f"{folder}/a.txt/corpus")
    free = prepare_module.shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="free some space"):
        prepare([folder], out)
    assert list(Path(out).parent.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(tmp_path, out, capfd):
    folder = tree(tmp_path / "in", {f"{n}.txt": "text" * 1000 for n in range(20)})
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from lctrain.cli import main;"
        "sys.exit(main(['data', 'prepare', f'input={sys.argv[1]}', f'output={sys.argv[2]}', 'workers=2']))"
    )
    assert subprocess.run([sys.executable, "-c", code, folder, out], timeout=60).returncode == 2
    said = capfd.readouterr().err
    assert "could not be written to its end (File too large)" in said
    assert len(said.splitlines()) == 1
    assert list(Path(out).parent.iterdir()) == []


SLOW_PREPARE = """
import sys, time
from lctrain.data.indexed import IndexedWriter
end = IndexedWriter.end_document
def slow(self):
    end(self)
    print("document", flush=True)
    time.sleep(0.05)
IndexedWriter.end_document = slow
from lctrain.cli import main
sys.exit(main(["data", "prepare", f"input={sys.argv[1]}", f"output={sys.argv[2]}", "workers=2"]))
"""


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_prepare_leaves_nothing_that_looks_whole(tmp_path, out, signum, status):
    folder = tree(tmp_path / "in", {f"{n}.txt": "text" for n in range(400)})
    process = subprocess.Popen([sys.executable, "-c", SLOW_PREPARE, folder, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) == 2
    process.send_signal(signum)
    assert process.wait(timeout=20) == status
    process.stdout.close()
    left = {path.name for path in Path(out).parent.iterdir()}
    assert left <= ({"corpus.bin.partial", "corpus.lock"} if signum == signal.SIGKILL else set())
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))
    prepare([f"{folder}/1.txt"], out)  # what a killed one left stands in nobody's way
    assert texts(out) == ["text"]
    assert len(list(Path(out).parent.iterdir())) == 3


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_corpora_of_a_run_are_prepared_once(tmp_path, out, data_config):
    folder = tree(tmp_path / "in", {"a.txt": "text"})
    config = data_config(out, source=folder)
    ensure_corpora(config, 257)
    stamp = os.stat(f"{out}.bin").st_mtime_ns
    ensure_corpora(config, 257)
    assert os.stat(f"{out}.bin").st_mtime_ns == stamp


def test_runs_that_start_together_share_one_preparation(tmp_path, out):
    folder = tree(tmp_path / "in", {f"{n}.txt": "text" for n in range(200)})
    code = (
        "import sys; from lctrain.config.schema import CorpusConfig, DataConfig;"
        "from lctrain.data.prepare import ensure_corpora;"
        "ensure_corpora(DataConfig(corpora=(CorpusConfig(prefix=sys.argv[1], source=(sys.argv[2],)),)), 257)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, out, folder], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sum("done in" in text for text in said) == 1
    assert len(texts(out)) == 200


def test_unfit_corpora_are_named_before_the_run(tmp_path, out, corpus, data_config):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere does not exist: run lctrain data prepare .*output=.*nowhere tokenizer=bytes"):
        ensure_corpora(data_config(missing), 257)
    with pytest.raises(UserError, match="c has no tokens"):
        ensure_corpora(data_config(corpus([])), 257)
    for sidecar in (True, False):
        prefix = corpus([300, 77], sidecar=sidecar)
        with pytest.raises(UserError, match=r"token ids up to 376, but model.vocab_size=300: set model.vocab_size=377"):
            ensure_corpora(data_config(prefix), 300)
        ensure_corpora(data_config(prefix), 377)
    prefix = corpus([4])
    with pytest.raises(UserError, match=r"prepared with tokenizer bytes, but data.tokenizer=dna"):
        ensure_corpora(data_config(prefix, tokenizer="dna"), 377)
    Path(f"{prefix}.json").write_text(Path(f"{prefix}.json").read_text().replace('"tokens": 4', '"tokens": 5'))
    with pytest.raises(UserError, match="5 tokens"):
        ensure_corpora(data_config(prefix), 377)


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path):
    path = tmp_path / "corpus.lock"
    first = prepare_module._lock(path)
    got = []
    waiting = threading.Thread(target=lambda: got.append(prepare_module._lock(path)), daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert not got
    path.unlink()  # as its holder does at the end
    third = path.open("w")  # somebody else, who comes before the waiting one wakes
    first.close()
    waiting.join(timeout=5)
    assert os.path.samestat(os.fstat(got[0].fileno()), path.stat())
    third.close()
    got[0].close()
