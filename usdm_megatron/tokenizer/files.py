"""The tokenizer's side of a conversion: extend it by USDM's tokens, and check the ids that come out.

The files are edited, never re-saved: what transformers saves depends on its version, and a
re-saved tokenizer can move `▁` and the stop token with it (huggingface/transformers#29625).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from usdm_megatron.errors import ConversionError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.vocab import CONTINUE_TOKEN, PAD_TOKEN, Vocabulary, unit_token

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
# Ids of Mistral-7B-v0.1's SentencePiece model, by which it is recognised.
_MISTRAL_PIECES = {"<s>": 1, "</s>": 2, "<0x0A>": 13, "▁some": 741, "▁": 28705}
_MISTRAL_TEXT_SIZE = 32_000
# What the original's dialog template needs of that tokenizer (as in `tests/data/dialog_golden.json`);
# strings are added tokens. 28705 is where the spoken reply stops.
_MISTRAL_CHECKS: tuple[tuple[str, tuple[int | str, ...]], ...] = (
    ("some words here", (1, 741, 3085, 1236)),
    ("\n", (1, 28705, 13)),
    (
        "### User\n<|unit5|><|correspond|>i'm fine\n",
        (1, 774, 1247, 13, "unit5", "correspond", 613, 28742, 28719, 4433, 13),
    ),
    ("<|unit1|><|unit2|>\n</s>", (1, "unit1", "unit2", 28705, 13, 2)),
)


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a `tokenizer.json` or a `tokenizer.model`."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy all tokenizer files as they are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def read_vocabulary(directory: Path, vocab_size: int, bos_id: int, eos_id: int) -> Vocabulary:
    """What the ids of a model mean, by its tokenizer: plain text, or already extended by speech.

    `vocab_size` is the model's. Raises `ConversionError` when tokenizer and model do not belong
    together, or only a part of USDM's tokens is there.
    """
    ids = token_ids(directory)
    size = max(ids.values()) + 1
    if CONTINUE_TOKEN not in ids:
        strays = [token for token in Vocabulary().added_tokens() if token in ids and token != PAD_TOKEN]
        if strays:
            raise ConversionError(
                f"{directory}: partially extended: the tokenizer has {strays[0]}, but not {CONTINUE_TOKEN}"
            )
        if size > vocab_size:
            raise ConversionError(
                f"{directory}: the tokenizer has {size} ids, the model only {vocab_size} "
                "(config.json, vocab_size)"
            )
        return Vocabulary(text_size=vocab_size, unit_count=0, bos_id=bos_id, eos_id=eos_id)
    text_size = ids[CONTINUE_TOKEN]
    unit_count = 0
    while ids.get(unit_token(unit_count)) == text_size + 2 + unit_count:
        unit_count += 1
    vocabulary = Vocabulary(text_size=text_size, unit_count=unit_count, bos_id=bos_id, eos_id=eos_id)
    if vocabulary.has_speech and ids.get(PAD_TOKEN) == vocabulary.pad_id:
        behind_pad = sorted((i, token) for token, i in ids.items() if i > vocabulary.pad_id)
        vocabulary = replace(vocabulary, extra_tokens=tuple(token for _, token in behind_pad))
    problems = (
        [] if vocabulary.has_speech else [f"{directory}: partially extended: there is no {unit_token(0)}"]
    )
    problems += _misplaced(directory, ids, vocabulary)
    if not problems and vocab_size != vocabulary.size:
        problems.append(
            f"{directory}: partially extended: the tokenizer has {vocabulary.size} ids, the model "
            f"{vocab_size} (config.json, vocab_size)"
        )
    if problems:
        raise ConversionError(*problems)
    return vocabulary


def ids_to_extend(directory: Path, text_size: int) -> dict[str, int]:
    """The `token_ids` of a text tokenizer; refused unless it ends where the ids of new tokens begin."""
    ids = token_ids(directory)
    if (size := max(ids.values()) + 1) != text_size:
        raise ConversionError(
            f"{directory}: the tokenizer has {size} ids and the model {text_size} rows; new tokens would not "
            "get the new rows"
        )
    return ids


def extend_tokenizer(source: Path, target: Path, vocabulary: Vocabulary, model_max_length: int) -> None:
    """Copy a plain text tokenizer and add the tokens of `vocabulary`, in order, behind its ids.

    Added tokens are special and not normalized, as the original's `AddedToken(…, normalized=False,
    special=True)`. A `tokenizer.json` is made where only `tokenizer.model` is there.
    Raises `ConversionError` when the text tokenizer does not end where the new ids begin.
    """
    ids_to_extend(source, vocabulary.text_size)
    copy_tokenizer(source, target)
    added = [
        {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for content in vocabulary.added_tokens()
    ]
    numbered = list(enumerate(added, start=vocabulary.text_size))
    content = _fast_content(source)
    content["added_tokens"] = [
        *content.get("added_tokens", []),
        *({"id": i, **token} for i, token in numbered),
    ]
    _write_json(target / "tokenizer.json", content)
    _edit_config(target, {str(i): token for i, token in numbered}, content["added_tokens"], model_max_length)
    if (target / "added_tokens.json").is_file():
        known = read_json_object(target / "added_tokens.json")
        _write_json(
            target / "added_tokens.json", {**known, **{str(token["content"]): i for i, token in numbered}}
        )


def check_tokenizer(directory: Path, vocabulary: Vocabulary, known_as: Path | None = None) -> None:
    """Load the tokenizer as a user would and check ids: every added one, and the dialog template's.

    The template is checked with Mistral's text tokenizer only; others cut text differently. `known_as` is
    what messages call a directory that is temporary.
    Raises `ConversionError` with the first ids that differ.
    """
    name = known_as or directory
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 - a local directory, never the hub
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise what they like on odd files
        raise ConversionError(f"{name}: transformers cannot load the tokenizer: {error}") from error
    problems = []
    if vocabulary.has_speech:
        tokens = vocabulary.added_tokens()
        expected = range(vocabulary.text_size, vocabulary.size)
        wrong = [
            f"{name}: {token} has id {found}, expected {wanted}"
            for token, found, wanted in zip(
                tokens, tokenizer.convert_tokens_to_ids(tokens), expected, strict=True
            )
            if found != wanted
        ]
        problems += wrong[:3]
        if vocabulary.text_size == _MISTRAL_TEXT_SIZE and _is_mistral(token_ids(directory)):
            problems += _template_problems(tokenizer, name, vocabulary)
    if problems:
        raise ConversionError(*problems)


def token_ids(directory: Path) -> dict[str, int]:
    """Every token string with its id, added tokens included."""
    content = _fast_content(directory)
    try:
        vocabulary = content["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else _enumerated(vocabulary)
        ids = {str(token): int(token_id) for token, token_id in pairs}
        ids.update({str(token["content"]): int(token["id"]) for token in content.get("added_tokens", [])})
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
        raise ConversionError(f"{directory / 'tokenizer.json'} is malformed: {error!r}") from error
    if not ids:
        raise ConversionError(f"{directory / 'tokenizer.json'} has no tokens")
    return ids


def _enumerated(vocabulary: list[Any]) -> list[tuple[str, int]]:
    return [(entry[0], token_id) for token_id, entry in enumerate(vocabulary)]  # Unigram: [token, score]


def _fast_content(directory: Path) -> dict[str, Any]:
    if (directory / "tokenizer.json").is_file():
        return read_json_object(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file():
        from usdm_megatron.tokenizer.sentencepiece_bpe import tokenizer_json_from_sentencepiece

        return tokenizer_json_from_sentencepiece(directory / "tokenizer.model")
    raise ConversionError(f"{directory} holds neither tokenizer.json nor tokenizer.model")


def _misplaced(directory: Path, ids: dict[str, int], vocabulary: Vocabulary) -> list[str]:
    expected = enumerate(vocabulary.added_tokens(), start=vocabulary.text_size)
    wrong = [
        f"{directory}: partially extended: {token} has id {ids.get(token)}, expected {token_id}"
        for token_id, token in expected
        if ids.get(token) != token_id
    ]
    return wrong[:3]


def _edit_config(
    target: Path, decoder: dict[str, Any], all_added: list[dict[str, Any]], model_max_length: int
) -> None:
    """tokenizer_config.json is what the slow tokenizer of transformers 4.x and both `AutoTokenizer`s read."""
    path = target / "tokenizer_config.json"
    config = read_json_object(path) if path.is_file() else {}
    from_json = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in all_added}
    known = config.get("added_tokens_decoder", {})
    if not isinstance(known, dict):
        raise ConversionError(
            f"{path}: added_tokens_decoder = {known!r} must be an object of id → token; remove it"
        )
    config["added_tokens_decoder"] = {**from_json, **known, **decoder}
    config["pad_token"] = PAD_TOKEN
    config["model_max_length"] = model_max_length
    _write_json(path, config)
    special = target / "special_tokens_map.json"
    if special.is_file():
        _write_json(special, {**read_json_object(special), "pad_token": PAD_TOKEN})


def _is_mistral(ids: dict[str, int]) -> bool:
    return all(ids.get(piece) == piece_id for piece, piece_id in _MISTRAL_PIECES.items())


def _template_problems(tokenizer: Any, directory: Path, vocabulary: Vocabulary) -> list[str]:
    named = {"correspond": vocabulary.correspond_id, "continue": vocabulary.continue_id}
    named |= {f"unit{i}": vocabulary.first_unit_id + i for i in range(min(10, vocabulary.unit_count))}
    problems = []
    for text, expected in _MISTRAL_CHECKS:
        if any(isinstance(token, str) and token not in named for token in expected):
            continue  # a vocabulary of fewer units
        wanted = [named[token] if isinstance(token, str) else token for token in expected]
        found = tokenizer(text)["input_ids"]
        if found != wanted:
            problems.append(
                f"{directory}: {text!r} becomes {found}, expected {wanted}: this tokenizer does not cut the "
                "dialog template as the original does"
            )
    return problems


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
