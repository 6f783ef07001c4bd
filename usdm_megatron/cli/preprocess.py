"""`tools/preprocess_data.py` and `usdm-megatron preprocess`: flags of the preprocessor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from usdm_megatron.data.preprocess import StoreOptions, preprocess_cache, preprocess_packed
from usdm_megatron.data.token_store import StoreSummary
from usdm_megatron.errors import ConfigError
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary


@dataclass(frozen=True, kw_only=True)
class _Flags:
    output_prefix: str
    """Prefix of the files to write: PREFIX.bin, PREFIX.idx, PREFIX.json."""
    seq_length: int = 8192
    """Longest row allowed, in tokens."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that made the ids: its size is checked, its hash recorded."""
    vocab: Literal["usdm", "text"] = "usdm"
    """usdm: text, speech units and control tokens; text: the text vocabulary alone."""
    text_vocab_size: int = USDM_VOCABULARY.text_size
    """Ids of the text vocabulary (Mistral: 32,000)."""
    overwrite: bool = False
    """Replace an existing store."""

    def __post_init__(self) -> None:
        least = max(USDM_VOCABULARY.bos_id, USDM_VOCABULARY.eos_id) + 1
        if self.text_vocab_size < least:
            raise ConfigError(
                f"--text-vocab-size is {self.text_vocab_size}, the least is {least}: bos and eos are text ids"
            )

    def options(self) -> StoreOptions:
        units = USDM_VOCABULARY.unit_count if self.vocab == "usdm" else 0
        return StoreOptions(
            seq_length=self.seq_length,
            vocabulary=Vocabulary(text_size=self.text_vocab_size, unit_count=units),
            tokenizer=self.tokenizer,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True, kw_only=True)
class CacheFlags(_Flags):
    """Stage 4: datasets saved to disk. A DatasetDict gives PREFIX_train and PREFIX_test."""

    input: Path
    """Directory that datasets.DatasetDict.save_to_disk wrote, column input_ids."""

    def run(self) -> dict[str, StoreSummary]:
        return preprocess_cache(self.input, self.output_prefix, self.options())


@dataclass(frozen=True, kw_only=True)
class PackedFlags(_Flags):
    """Stage 3: text files, one packed row of ids a line; read in natural order."""

    input: tuple[Path, ...]
    """The files, e.g. part*.txt."""

    def run(self) -> dict[str, StoreSummary]:
        return preprocess_packed(self.input, self.output_prefix, self.options())


Command = (
    Annotated[CacheFlags, tyro.conf.subcommand("cache")]
    | Annotated[PackedFlags, tyro.conf.subcommand("packed")]
)


def main(argv: Sequence[str]) -> int | None:
    """Parse `argv`, write the stores, print one line a store."""
    command = tyro.cli(
        Command,
        args=list(argv),
        prog="preprocess_data.py",
        description="Write packed token stores (Megatron .bin/.idx and a .json).",
    )
    for prefix, summary in command.run().items():
        print(describe(prefix, summary))
    return None


def describe(prefix: str, summary: StoreSummary) -> str:
    """One line about a store, and one for each notice."""
    lines = [
        f"{prefix}: {summary.rows:,} rows, {summary.samples:,} samples, {summary.tokens:,} tokens, "
        f"{summary.fill:.1%} full, longest row {summary.longest_row:,}, largest id {summary.largest_id:,}"
    ]
    lines += [f"  notice: {name}: {count:,}" for name, count in summary.notices.items()]
    return "\n".join(lines)
