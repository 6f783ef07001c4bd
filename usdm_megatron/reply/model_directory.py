"""An exported model's directory as the reply check needs it, without its weights (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.errors import DataError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.tokenizer.files import has_tokenizer, token_ids
from usdm_megatron.tokenizer.text_encoder import TextEncoder, extended_tokenizer
from usdm_megatron.vocab import CONTINUE_TOKEN, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_EXPORT = "python tools/convert_hf_checkpoint.py export"


@dataclass(frozen=True)
class ModelDirectory:
    """What the ids of an exported speech model mean, and how many it reads at once."""

    path: Path
    vocabulary: Vocabulary
    tokenizer_sha256: str
    context_tokens: int  # the shorter of the tokenizer's model_max_length and the model's positions

    @cached_property
    def encoder(self) -> TextEncoder:
        """Text → ids, as the training data was encoded."""
        return TextEncoder(self.path)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids → text, special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        path = self.path / "tokenizer.json"  # an extended tokenizer always has one
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise DataError(f"{path}: cannot be read as a tokenizer ({error}); export again") from error


def open_model_directory(path: Path) -> ModelDirectory:
    """Read config and tokenizer of `--model`; raises a `UserError` for anything but a speech model."""
    if not path.is_dir():
        raise DataError(f"--model {path}: no such directory; it takes what {_EXPORT} wrote")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise DataError(f"--model {path}: holds an adapter without its base; export it with --merge-lora")
        raise DataError(f"--model {path}: no config.json in it; it takes what {_EXPORT} wrote")
    architecture = HFArchitecture.from_hf_config(read_json_object(path / "config.json"))
    if not has_tokenizer(path):
        raise DataError(f"--model {path}: no tokenizer in it; copy its files there, or {_EXPORT} again")
    if CONTINUE_TOKEN not in token_ids(path):
        raise DataError(
            f"--model {path}: its vocabulary of {architecture.vocab_size:,} ids has no speech units; import "
            "with --extend-vocab usdm, train, and export"
        )
    vocabulary, tokenizer_sha256 = extended_tokenizer(path)
    return ModelDirectory(path, vocabulary, tokenizer_sha256, _context_tokens(path, architecture))


def _context_tokens(path: Path, architecture: HFArchitecture) -> int:
    config_path = path / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.is_file() else {}
    longest = config.get("model_max_length")  # 1e30, or 0 of some writers, is no limit
    if not isinstance(longest, int | float) or longest < 1:
        return architecture.max_positions
    return int(min(longest, architecture.max_positions))
