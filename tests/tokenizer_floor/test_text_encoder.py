"""Transcripts get the ids that the original's tokenizer gives them, whichever directory is passed."""

from __future__ import annotations

import functools
import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.convert_floor.conftest import write_hf_model
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ImportOptions
from usdm_megatron.demo.tokenizer import mistral_sentencepiece_model, write_mistral_tokenizer
from usdm_megatron.errors import ConversionError, DataError
from usdm_megatron.tokenizer import text_encoder
from usdm_megatron.tokenizer.identity import tokenizer_sha256
from usdm_megatron.tokenizer.text_encoder import TextEncoder, extended_tokenizer
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of Mistral-7B-v0.1."""
    return write_mistral_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """The tokenizer directory of a checkpoint that the converter extended."""
    root = tmp_path_factory.mktemp("converted")
    model = write_hf_model(root / "hf", vocab_size=32_000, hidden_size=8)
    shutil.copytree(plain, model, dirs_exist_ok=True)
    summary = run_import(ImportOptions(hf_path=str(model), save=root / "ck", extend_vocab="usdm"))
    return summary.path / "tokenizer"


@functools.cache
def sentencepiece_model() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(mistral_sentencepiece_model()))


def oracle(text: str) -> list[int]:
    return list(sentencepiece_model().encode(text))


# ── what the converter stores ──


def test_a_plain_tokenizer_is_extended_as_the_converter_does(plain: Path, converted: Path) -> None:
    extended = extended_tokenizer(plain)
    assert extended.vocabulary == USDM_VOCABULARY
    assert extended.sha256 == tokenizer_sha256(converted) != tokenizer_sha256(plain)
    assert extended_tokenizer(converted) == extended


def test_a_model_directory_and_sentencepiece_alone_say_the_same(
    plain: Path, converted: Path, tmp_path: Path
) -> None:
    assert extended_tokenizer(converted.parent.parent.parent / "hf") == extended_tokenizer(plain)
    shutil.copyfile(plain / "tokenizer.model", tmp_path / "tokenizer.model")
    assert extended_tokenizer(tmp_path).vocabulary == USDM_VOCABULARY
    assert TextEncoder(tmp_path).encode("a river").tolist() == TextEncoder(plain).encode("a river").tolist()


def test_other_bos_and_eos(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "bos_token": {"content": "</s>"}, "eos_token": "<unk>"}))
    assert extended_tokenizer(tmp_path).vocabulary == Vocabulary(bos_id=2, eos_id=0)
    path.write_text(json.dumps({**config, "bos_token": "<begin>"}))
    with pytest.raises(DataError, match="'<begin>' is none of its tokens"):
        extended_tokenizer(tmp_path)


def test_partially_extended_and_absent_tokenizers(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither tokenizer.json nor tokenizer.model"):
        extended_tokenizer(tmp_path)
    content = json.loads((converted / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|unit7|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="partially extended"):
        extended_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"added_tokens": 3}, {"added_tokens": [{}]}, {"model": {"type": "BPE"}}]
)
def test_a_broken_tokenizer_is_an_error(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        TextEncoder(tmp_path).encode("a")


# ── ids ──


def texts(count: int) -> list[str]:
    """Pieces of the vocabulary and noise, with odd spaces in some."""
    model = sentencepiece_model()
    draw = random.Random(0)
    pieces = [model.id_to_piece(i).replace("▁", " ") for i in range(259, 32_000)]
    letters = "abcdefghijklmnopqrstuvwxyz '  é梦🙂"
    made = []
    for number in range(count):
        mixed = "".join(draw.choice(pieces) for _ in range(draw.randint(1, 12)))
        noise = "".join(draw.choice(letters) for _ in range(draw.randint(1, 60)))
        made += [text if number % 3 == 0 else " ".join(text.split()) for text in (mixed, noise)]
    return made


def test_ids_are_sentencepieces_word_by_word_or_whole(plain: Path, converted: Path) -> None:
    some = texts(200)
    expected = [oracle(text) for text in some]
    for directory in (plain, converted):
        encoder = TextEncoder(directory)
        together = encoder.encode_batch(some)
        assert [ids.tolist() for ids in together] == expected
        assert [encoder.encode(text).tolist() for text in some] == expected


def test_words_are_encoded_once(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = text_encoder._LoadedTokenizer(plain)
    asked: list[str] = []
    encode = loaded._encode
    monkeypatch.setattr(loaded, "_encode", lambda words: asked.extend(words) or encode(words))
    first, second = loaded.encode_batch(["the river the river", "the stone"])
    assert (first.tolist(), second.tolist()) == (oracle("the river the river"), oracle("the stone"))
    assert loaded.encode_batch([]) == []
    loaded.encode_batch(["stone river"])
    assert asked == ["river", "stone", "the"]
    monkeypatch.setattr(text_encoder, "_MOST_KNOWN_WORDS", 2)
    assert loaded.encode_batch(["a river"])[0].tolist() == oracle("a river")
    assert set(loaded._known_words) == {"a", "river"}


def test_a_tokenizer_that_reaches_across_spaces_is_not_taken_apart(plain: Path, tmp_path: Path) -> None:
    content = json.loads((plain / "tokenizer.json").read_text())
    content["model"]["vocab"]["e▁"] = 32_000
    content["model"]["merges"].insert(0, "e ▁")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert 32_000 in TextEncoder(tmp_path).encode("the river").tolist()


def test_pickled_as_a_path(plain: Path) -> None:
    encoder = TextEncoder(plain)
    encoder.encode("a river")
    assert len(pickle.dumps(encoder)) < 1000
    assert pickle.loads(pickle.dumps(encoder)).encode("a river").tolist() == oracle("a river")


# ── tokens that text must not spell ──


@pytest.mark.parametrize(
    "token", ["<|unit5|>", "<|unit9999|>", "<|continue|>", "<|correspond|>", "<pad>", "<s>", "</s>", "<unk>"]
)
def test_special_tokens_are_found_in_text(plain: Path, converted: Path, token: str) -> None:
    for directory in (plain, converted):
        encoder = TextEncoder(directory)
        assert encoder.special_token_in(f"so{token}it goes") == token
        assert encoder.special_token_in("so it goes") is None
        assert encoder.special_token_in("a < b and <|unit10000|> and <|unit5 |>") is None


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(["<|", "unit", "5", "|>", "<|unit5|>", "<|continue|>", "<pad>", " ", "a"])).map(
        "".join
    )
)
def test_no_text_becomes_a_speech_id(plain: Path, converted: Path, text: str) -> None:
    """Also where nobody asked `special_token_in` first."""
    for directory in (plain, converted):
        assert all(token_id < 32_000 for token_id in TextEncoder(directory).encode(text).tolist())
