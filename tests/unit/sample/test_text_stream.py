"""Text that grows id by id."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.data.tokenizers import ByteTokenizer, DnaTokenizer, load_tokenizer
from lctrain.sample import TextStream


def stream(tokenizer, ids: list[int]) -> list[str]:
    text = TextStream(tokenizer)
    return [*(text.push(token) for token in ids), text.finish()]


@given(st.text(max_size=20))
def test_text_comes_out_character_by_character(text: str) -> None:
    ids = ByteTokenizer().encode(text.encode("utf-8", "replace").decode()).tolist()
    pieces = stream(ByteTokenizer(), ids)
    whole = ByteTokenizer().decode(ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert all("\ufffd" not in piece for piece in pieces), "half a character was shown"
        assert pieces[-1] == ""


@given(st.lists(st.integers(0, 256), max_size=24))
def test_any_bytes_add_up_to_the_whole(ids: list[int]) -> None:
    assert "".join(stream(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


def test_a_character_waits_for_its_last_byte() -> None:
    ids = list("a€b".encode())
    assert stream(ByteTokenizer(), ids) == ["a", "", "", "€", "b", ""]


def test_a_character_that_is_never_finished_shows_as_broken() -> None:
    assert stream(ByteTokenizer(), [*b"a", 0xE2, 0x82]) == ["a", "", "", "\ufffd"]
    assert stream(ByteTokenizer(), [0xE2, *b"ab"]) == ["", "\ufffda", "b", ""]


def test_end_of_document_shows_nothing() -> None:
    assert stream(ByteTokenizer(), [97, 256, 98]) == ["a", "", "b", ""]


def test_nucleotides() -> None:
    assert stream(DnaTokenizer(), [0, 1, 2, 3]) == ["A", "C", "G", "T", ""]


@pytest.fixture(scope="module")
def subwords(tmp_path_factory) -> str:
    """A byte-level tokenizer with a few merges, trained here; most characters beyond ASCII take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat and the hat, naïve café"] * 5, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return str(path)


@pytest.mark.parametrize("text", ["the hat and the cat", "naïve 🙂 café 漢字", " leading", "a  b\n\n  c", "日本"])
def test_subwords(subwords: str, text: str) -> None:
    tokenizer = load_tokenizer(subwords)
    ids = tokenizer.encode(text).tolist()
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(np.array(ids))
    assert all("\ufffd" not in piece for piece in pieces)


def test_metaspace_keeps_the_blanks_between_words(tmp_path) -> None:
    """SentencePiece-like decoders drop the blank before the first token: only there, not at every push."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<eos>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<unk>": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    assert stream(load_tokenizer(str(path)), [1, 2, 3, 1]) == ["the", " cat", "s", " the", ""]
