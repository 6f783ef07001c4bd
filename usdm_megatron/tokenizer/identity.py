"""What a store and a checkpoint need to know of a tokenizer, without loading one (no transformers)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from usdm_megatron.errors import DataError
from usdm_megatron.file_reading import file_sha256


def tokenizer_sha256(directory: Path) -> str:
    """The hash that identifies a tokenizer: of `tokenizer.json`, else of `tokenizer.model`."""
    return file_sha256(_tokenizer_file(directory))


def tokenizer_size(directory: Path) -> int:
    """Number of ids (largest id + 1), added tokens included."""
    path = _tokenizer_file(directory)
    try:
        return _fast_size(path) if path.suffix == ".json" else _sentencepiece_size(path)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a tokenizer ({error}); save it again") from error


def _tokenizer_file(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    raise DataError(
        f"{directory}: neither tokenizer.json nor tokenizer.model in it; --tokenizer takes the directory of "
        "a Hugging Face model or tokenizer"
    )


def _fast_size(path: Path) -> int:
    record: dict[str, Any] = json.loads(path.read_bytes())
    vocabulary = record["model"]["vocab"]  # token → id, or for Unigram a list of (token, score)
    ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else list(vocabulary.values())
    ids += [token["id"] for token in record.get("added_tokens", [])]
    return max(ids) + 1


def _sentencepiece_size(path: Path) -> int:
    import sentencepiece

    ids = [sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size() - 1]
    added = path.with_name("added_tokens.json")
    if added.is_file():
        ids += json.loads(added.read_bytes()).values()
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        ids += [int(key) for key in json.loads(config.read_bytes()).get("added_tokens_decoder", {})]
    return max(ids) + 1
