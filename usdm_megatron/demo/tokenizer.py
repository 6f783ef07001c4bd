"""The tokenizer of Mistral-7B-v0.1 as a plain Hugging Face directory, offline.

The real SentencePiece model ships inside the PyPI package `mistral-common`, so the demo's and
the tests' token ids are the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer.sentencepiece_bpe import tokenizer_json_from_sentencepiece


def mistral_sentencepiece_model() -> Path:
    """Where `mistral-common` keeps the SentencePiece model of Mistral-7B-v0.1."""
    spec = importlib.util.find_spec("mistral_common")  # finds the files without importing the package
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / "data" / "tokenizer.model.v1"
        if path.is_file():
            return path
    raise ConversionError(
        "the demo's tokenizer is the real one of Mistral-7B-v0.1, which the package mistral-common carries; "
        "install it with `pip install mistral-common`"
    )


def write_mistral_tokenizer(directory: Path | str) -> Path:
    """Write `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    The four files say what `mistralai/Mistral-7B-v0.1` publishes; the same bytes every time.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    source = mistral_sentencepiece_model()
    content = tokenizer_json_from_sentencepiece(source)
    shutil.copyfile(source, directory / "tokenizer.model")
    _write_json(directory / "tokenizer.json", content)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(content["added_tokens"]))
    _write_json(directory / "special_tokens_map.json", _SPECIAL_TOKENS)
    return directory


_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # nosec B105 - no password


def _tokenizer_config(added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "add_bos_token": True,  # nosec B105 - no password
        "add_eos_token": False,  # nosec B105 - no password
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in added_tokens
        },
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,  # int(1e30): transformers' "no limit"
        "pad_token": None,  # nosec B105 - no password
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **_SPECIAL_TOKENS,
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
