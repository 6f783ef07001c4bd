"""Transcripts → token ids, by a plain Mistral tokenizer or one that is extended by USDM's tokens.

Both give the same ids: text is encoded without USDM's tokens, so that no transcript can spell a speech
unit. Each text is encoded alone, as its own string: `▁` is put before it, as the original does.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from usdm_megatron.errors import DataError, UserError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.tokenizer.files import extend_tokenizer, read_vocabulary, token_ids
from usdm_megatron.tokenizer.identity import tokenizer_sha256, tokenizer_size
from usdm_megatron.tokenizer.sentencepiece_bpe import tokenizer_json_from_sentencepiece
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

_WORD_START = "▁"
_MOST_KNOWN_WORDS = 1 << 18  # about 64 MiB; then they are encoded anew
# A normalizer under which every word of a single-spaced text begins with `▁`, the first one too.
_WORD_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _WORD_START},
        {"type": "Replace", "pattern": {"String": " "}, "content": _WORD_START},
    ],
}


class ExtendedTokenizer(NamedTuple):
    """What a tokenizer's ids mean once it has USDM's tokens, and the hash that a checkpoint knows it by."""

    vocabulary: Vocabulary
    sha256: str


def extended_tokenizer(directory: Path) -> ExtendedTokenizer:
    """The vocabulary and sha256 that `convert_hf_checkpoint.py import --extend-vocab usdm` stores.

    An extended tokenizer gives its own; a plain one is extended in a temporary directory as the
    converter does it. Raises `DataError` or `ConversionError` for a directory that is neither.
    """
    found = _found_vocabulary(directory)
    if found.has_speech:
        return ExtendedTokenizer(found, tokenizer_sha256(directory))
    vocabulary = Vocabulary(
        text_size=found.text_size,
        unit_count=USDM_VOCABULARY.unit_count,
        bos_id=found.bos_id,
        eos_id=found.eos_id,
    )
    try:
        with tempfile.TemporaryDirectory() as scratch:
            # The longest length stands in tokenizer_config.json, which is not hashed.
            extend_tokenizer(directory, Path(scratch), vocabulary, model_max_length=1)
            return ExtendedTokenizer(vocabulary, tokenizer_sha256(Path(scratch)))
    except OSError as error:
        raise DataError(
            f"{error.filename or tempfile.gettempdir()}: cannot write the extended tokenizer "
            f"({error.strerror}); free space there, set TMPDIR, or raise the limit of file sizes (ulimit -f)"
        ) from error


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts without bos and eos; pickled as its path, loaded once a process."""

    directory: Path

    def special_token_in(self, text: str) -> str | None:
        """A token of the tokenizer's own, or of USDM's, that `text` spells out, if any: `<|unit5|>`."""
        return _load(self.directory).special_token_in(text)

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, int32. Callers refuse texts with a `special_token_in` first."""
        return _load(self.directory).encode_batch(texts)


class _LoadedTokenizer:
    """A tokenizer in memory, and the ids of the words it has met.

    Where no piece reaches across a space (`_is_wordwise`), a text's ids are its words' ids, and words
    come again and again: five times the speed of encoding every text.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        try:
            content = _text_only_content(directory)
            added = [token["content"] for token in content["added_tokens"]]
            self._tokenizer = Tokenizer.from_str(json.dumps(content))
        except UserError:
            raise
        except Exception as error:  # tokenizers raises bare Exceptions
            raise DataError(f"{directory}: cannot be read as a tokenizer ({error}); save it again") from error
        self._special_tokens = [token for token in (*added, *USDM_VOCABULARY.added_tokens()) if token]
        self._first_characters = {token[0] for token in self._special_tokens}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._wordwise = _is_wordwise(content)
        self._known_words: dict[str, list[int]] = {}

    def special_token_in(self, text: str) -> str | None:
        if not any(character in text for character in self._first_characters):
            return None
        return next((token for token in self._special_tokens if token in text), None)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not (self._wordwise and all(map(_is_single_spaced, texts))):
            return [np.array(ids, dtype=np.int32) for ids in self._encode(texts)]
        words_of = [text.split(" ") for text in texts]
        known = self._know(chain.from_iterable(words_of))
        ids_of = [[known[word] for word in words] for words in words_of]
        flat = np.fromiter(chain.from_iterable(chain.from_iterable(ids_of)), dtype=np.int32)
        ends = np.cumsum([sum(map(len, word_ids)) for word_ids in ids_of])
        return np.split(flat, ends[:-1]) if texts else []

    def _know(self, words: Iterable[str]) -> dict[str, list[int]]:
        wanted = set(words)
        if len(self._known_words) + len(wanted) > _MOST_KNOWN_WORDS:
            self._known_words.clear()
        new = sorted(wanted - self._known_words.keys())
        self._known_words.update(zip(new, self._encode(new), strict=True))
        return self._known_words

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]


@functools.lru_cache(maxsize=4)
def _load(directory: Path) -> _LoadedTokenizer:
    return _LoadedTokenizer(directory)


def _text_only_content(directory: Path) -> dict[str, Any]:
    """The content of `tokenizer.json` without USDM's tokens."""
    if (directory / "tokenizer.json").is_file():
        content = read_json_object(directory / "tokenizer.json")
    else:
        content = tokenizer_json_from_sentencepiece(directory / "tokenizer.model")
    ours = set(USDM_VOCABULARY.added_tokens())
    added = [token for token in content.get("added_tokens", []) if token["content"] not in ours]
    return {**content, "added_tokens": added}


def _is_wordwise(content: dict[str, Any]) -> bool:
    """Whether the ids of a single-spaced text are those of its words, one after the other.

    So it is with a BPE model that sees `▁` before every word, and has `▁` in no piece but at its
    beginning: then no merge reaches from one word to the next. True of Mistral's and Llama 2's.
    """
    model = content.get("model", {})
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and content.get("normalizer") == _WORD_NORMALIZER
        and content.get("pre_tokenizer") is None
        and not any(_WORD_START in piece.lstrip(_WORD_START) for piece in model.get("vocab", {}))
        and not any(" " in token["content"] for token in content["added_tokens"])
    )


def _is_single_spaced(text: str) -> bool:
    return bool(text) and text[0] != " " and text[-1] != " " and "  " not in text and _WORD_START not in text


def _found_vocabulary(directory: Path) -> Vocabulary:
    found_size = tokenizer_size(directory)
    ids = token_ids(directory)
    config = read_json_object(directory / "config.json") if (directory / "config.json").is_file() else {}
    size = config.get("vocab_size", found_size)
    special = {name: _special_id(directory, ids, config, name) for name in ("bos", "eos")}
    return read_vocabulary(directory, int(size), special["bos"], special["eos"])


def _special_id(directory: Path, ids: dict[str, int], config: dict[str, Any], name: str) -> int:
    """Of a model's config as the converter reads it, else of the tokenizer's, else `<s>` and `</s>`."""
    token_id = config.get(f"{name}_token_id")
    if isinstance(token_id, list) and token_id:  # several ways to end: the first is the tokenizer's
        token_id = token_id[0]
    if isinstance(token_id, int):
        return token_id
    path = directory / "tokenizer_config.json"
    token = read_json_object(path).get(f"{name}_token") if path.is_file() else None
    if isinstance(token, dict):
        token = token.get("content")
    token = token or {"bos": "<s>", "eos": "</s>"}[name]
    if token not in ids:
        raise DataError(
            f"{directory}: the tokenizer has no {name} token ({token!r} is none of its tokens); samples "
            "begin with bos and end with eos: name them in tokenizer_config.json"
        )
    return ids[token]
