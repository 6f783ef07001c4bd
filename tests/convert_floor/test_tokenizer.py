"""The tokenizer that leaves the converter makes the original's ids."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.convert_floor.conftest import edit_json
from usdm_megatron.demo.tokenizer import mistral_sentencepiece_model, write_mistral_tokenizer
from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer.files import check_tokenizer, extend_tokenizer, read_vocabulary, token_ids
from usdm_megatron.tokenizer.identity import tokenizer_sha256, tokenizer_size
from usdm_megatron.tokenizer.sentencepiece_bpe import tokenizer_json_from_sentencepiece
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "dialog_golden.json").read_text())
TEMPLATE = (
    "Below is a conversation between the user and the agent. Each turn includes the user's speech and its "
    "corresponding transcript, along with the agent's response text and the corresponding speech.\n\n"
    "### User\n{user_units}<|correspond|>{user_text}\n"
    "### Agent\n{agent_text}<|correspond|>{agent_units}\n</s>"
)


def load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def dialog(sample: dict[str, Any]) -> str:
    user, agent = (GOLDEN["turns"][turn] for turn in sample["turn_pair"])
    units = ["".join(f"<|unit{unit}|>" for unit in turn["units"]) for turn in (user, agent)]
    return TEMPLATE.format(
        user_units=units[0],
        user_text=user["text"].lower(),
        agent_text=agent["text"].lower(),
        agent_units=units[1],
    )


def test_the_exported_tokenizer_makes_the_golden_ids(exported: Path) -> None:
    tokenizer = load(exported)
    for piece, ids in GOLDEN["pieces"].items():
        assert tokenizer(piece)["input_ids"] == ids, piece
    assert len(GOLDEN["samples"]) == 2
    for sample in GOLDEN["samples"]:
        assert tokenizer(dialog(sample))["input_ids"] == sample["ids"]


def test_every_added_token_has_its_id_and_stays_whole(exported: Path) -> None:
    tokenizer = load(exported)
    assert len(tokenizer) == 42_003
    assert tokenizer.convert_ids_to_tokens(range(32_000, 42_003)) == USDM_VOCABULARY.added_tokens()
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 42_002)
    assert tokenizer.model_max_length == 96  # the model's positions: the original generates up to it
    text = "".join(f"<|unit{unit}|>" for unit in (0, 9_999, 123))
    assert tokenizer(text)["input_ids"] == [1, 32_002, 42_001, 32_125]
    assert tokenizer.decode([32_002, 42_001], skip_special_tokens=True) == ""  # special, as the original's


def test_the_demo_tokenizer_is_sentencepieces(tokenizer_dir: Path) -> None:
    """The oracle is SentencePiece itself, on text that BPE merges get wrong when their order is."""
    import sentencepiece
    from tokenizers import Tokenizer

    model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_sentencepiece_model()))
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    draw = random.Random(0)
    pieces = [model.id_to_piece(i).replace("▁", " ") for i in range(259, 32_000)]
    letters = "abcdefghijklmnopqrstuvwxyz  ,.'\n01é梦🙂\t"
    for _ in range(300):
        mixed = "".join(draw.choice(pieces) for _ in range(draw.randint(1, 12)))
        noise = "".join(draw.choice(letters) for _ in range(draw.randint(1, 60)))
        for text in (mixed, noise):
            assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text), repr(text)


def test_the_demo_tokenizer_is_the_same_bytes_every_time(tokenizer_dir: Path, tmp_path: Path) -> None:
    write_mistral_tokenizer(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (tokenizer_dir / path.name).read_bytes()
    assert tokenizer_size(tmp_path) == 32_000
    assert tokenizer_sha256(tmp_path) == tokenizer_sha256(tokenizer_dir)


def test_tokenizer_json_is_made_where_only_sentencepiece_is_there(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, source / name)
    extend_tokenizer(source, tmp_path / "target", USDM_VOCABULARY, 8192)
    check_tokenizer(tmp_path / "target", USDM_VOCABULARY)
    assert token_ids(tmp_path / "target")["<|unit0|>"] == 32_002


def test_old_added_tokens_file_is_extended_too(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tokenizer_dir, source)
    (source / "added_tokens.json").write_text("{}")
    extend_tokenizer(source, tmp_path / "target", USDM_VOCABULARY, 8192)
    added = json.loads((tmp_path / "target" / "added_tokens.json").read_text())
    assert (len(added), added["<|continue|>"], added["<pad>"]) == (10_003, 32_000, 42_002)


def test_a_moved_space_is_noticed(exported: Path, tmp_path: Path) -> None:
    """Pitfall 18: without the prefix in front of each stretch of text, 28705 never comes."""
    shutil.copytree(exported, tmp_path / "moved")
    edit_json(tmp_path / "moved" / "tokenizer_config.json", add_prefix_space=False)
    path = tmp_path / "moved" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = content["normalizer"]["normalizers"][1]
    path.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="does not cut the dialog template as the original does"):
        check_tokenizer(tmp_path / "moved", USDM_VOCABULARY)


# ── what a source's tokenizer says about its ids ──


def tiny_tokenizer(directory: Path, tokens: list[str]) -> Path:
    directory.mkdir()
    content = {
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}},
        "added_tokens": [],
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


SPEECH = ["<|continue|>", "<|correspond|>", "<|unit0|>", "<|unit1|>", "<pad>"]
TEXT = ["<unk>", "<s>", "</s>", "a"]


def test_small_speech_vocabularies_are_read(tmp_path: Path) -> None:
    directory = tiny_tokenizer(tmp_path / "t", TEXT + SPEECH)
    assert read_vocabulary(directory, 9, 1, 2) == Vocabulary(text_size=4, unit_count=2)
    plain = tiny_tokenizer(tmp_path / "plain", [*TEXT, "<pad>"])
    assert read_vocabulary(plain, 6, 1, 2) == Vocabulary(text_size=6, unit_count=0)


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "message"),
    [
        (TEXT + SPEECH, 4, "the tokenizer has 9 ids, the model 4"),
        (TEXT + SPEECH[:-1], 8, "<pad> has id None, expected 8"),
        (TEXT + SPEECH[:2] + SPEECH[-1:], 7, "there is no <|unit0|>"),
        ([*TEXT, SPEECH[1], SPEECH[0], *SPEECH[2:]], 9, "there is no <\\|unit0\\|>"),
        (TEXT + SPEECH[1:], 8, "has <\\|correspond\\|>, but not <\\|continue\\|>"),
        (TEXT, 3, "the tokenizer has 4 ids, the model only 3"),
    ],
)
def test_partial_extensions_are_refused(
    tmp_path: Path, tokens: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(ConversionError) as refused:
        read_vocabulary(tiny_tokenizer(tmp_path / "t", tokens), vocab_size, 1, 2)
    assert message.replace("\\", "") in str(refused.value)


def test_a_tokenizer_that_ends_elsewhere_is_not_extended(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="32000 ids and the model 32064 rows"):
        extend_tokenizer(tokenizer_dir, tmp_path / "target", Vocabulary(text_size=32_064), 8192)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}}'])
def test_malformed_tokenizer_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConversionError, match="tokenizer.json"):
        token_ids(tmp_path)


def test_a_file_that_is_no_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ConversionError, match="not a SentencePiece model"):
        tokenizer_json_from_sentencepiece(tmp_path / "tokenizer.model")
