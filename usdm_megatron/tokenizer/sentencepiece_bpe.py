"""A `tokenizer.json` made from a SentencePiece BPE model, without transformers.

Which `tokenizer.json` a converter writes depends on its version, and a re-saved tokenizer can
move `▁` and the stop token with it (huggingface/transformers#29625). This one writes what
`mistralai/Mistral-7B-v0.1` published: `▁` is put before every stretch of text between special
tokens (the "legacy" behaviour that USDM was trained with).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usdm_megatron.errors import ConversionError

# Encoded by both, before the result is believed.
_PROBES = ("Hello there, how are you?", "\n", "I'm  fine\n\n### Agent\n", "naïve 梦 🙂 1234")


def tokenizer_json_from_sentencepiece(model_path: Path) -> dict[str, Any]:
    """The content of `tokenizer.json` for a SentencePiece BPE model with byte fallback.

    Raises `ConversionError` when the file is no such model, or the two tokenizers differ.
    """
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{model_path}: not a SentencePiece model ({error})") from error
    bos = model.id_to_piece(model.bos_id())
    special_ids = (model.unk_id(), model.bos_id(), model.eos_id())
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(model, token_id) for token_id in sorted(special_ids)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), _sequence("A", 0)],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {model.id_to_piece(i): i for i in range(len(model))},
            "merges": _merges(model),
        },
    }
    _check_equal(model, content, model_path)
    return content


def _added_token(model: Any, token_id: int) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": model.id_to_piece(token_id),
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _special(token: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _merges(model: Any) -> list[str]:
    """BPE merges as `left right`, in the order of `transformers.convert_slow_tokenizer.generate_merges`.

    A piece may be reached from every pair of pieces that spell it; SentencePiece prefers the
    piece with the best score, whichever pair it came from.
    """
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    found: list[tuple[float, str, str]] = []
    for piece, piece_id in ids.items():
        if model.is_control(piece_id) or model.is_unknown(piece_id):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = sorted((ids[left], ids[right]) for left, right in pairs if left in ids and right in ids)
        score = model.get_score(piece_id)
        found += [(score, model.id_to_piece(left), model.id_to_piece(right)) for left, right in known]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [f"{left} {right}" for _, left, right in found]


def _check_equal(model: Any, content: dict[str, Any], model_path: Path) -> None:
    import json

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(content))
    for text in _PROBES:
        expected = model.encode(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != expected:
            raise ConversionError(
                f"{model_path}: only SentencePiece BPE models with byte fallback and a dummy prefix are "
                f"supported; {text!r} becomes {ids} instead of {expected}. Put a tokenizer.json beside it"
            )
