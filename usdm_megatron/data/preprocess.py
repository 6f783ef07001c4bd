"""Packed rows → token stores: what `tools/preprocess_data.py` does, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from usdm_megatron.data.sources import PackedTextSource, RowSource, SourceHasher, open_cache
from usdm_megatron.data.token_store import StoreSummary
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.tokenizer.identity import tokenizer_sha256, tokenizer_size
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

ROWS_WITHOUT_BOS = "rows_without_leading_bos"


@dataclass(frozen=True)
class StoreOptions:
    """What every kind of input has in common; `seq_length` is the longest row allowed, in tokens."""

    seq_length: int = 8192
    vocabulary: Vocabulary = USDM_VOCABULARY
    tokenizer: Path | None = None  # directory; its size is compared with the vocabulary, its hash recorded
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"--seq-length is {self.seq_length}, the least is 1")


def preprocess_cache(directory: Path, output_prefix: str, options: StoreOptions) -> dict[str, StoreSummary]:
    """Turn a dataset on disk into stores; summaries by prefix.

    A `DatasetDict` gives `{output_prefix}_{split}` for each split, a single `Dataset` `output_prefix`.
    All stores appear together at the end, or none does.
    """
    sources = {
        f"{output_prefix}_{split}" if split else output_prefix: source
        for split, source in open_cache(directory).items()
    }
    return write_stores(sources, options, command="cache")


def preprocess_packed(
    paths: Sequence[Path], output_prefix: str, options: StoreOptions
) -> dict[str, StoreSummary]:
    """Turn `part*.txt` files (a row of ids a line, read in natural order) into the store `output_prefix`."""
    return write_stores({output_prefix: PackedTextSource(paths)}, options, command="packed")


def write_stores(
    sources: Mapping[str, RowSource], options: StoreOptions, *, command: str
) -> dict[str, StoreSummary]:
    """Write one store a source, by prefix; a `DataError` if any input is bad, and then nothing is left."""
    tokenizer_hash = _checked_tokenizer_hash(options)
    recorded = {"command": command, "seq_length": options.seq_length}
    summaries = {}
    with ExitStack() as stack:
        writers = {
            prefix: stack.enter_context(
                TokenStoreWriter(
                    prefix,
                    options.vocabulary,
                    row_capacity=options.seq_length,
                    overwrite=options.overwrite,
                )
            )
            for prefix in sources
        }
        for prefix, source in sources.items():
            with SourceHasher(source.files()) as hasher:
                rows_without_bos = _append_all(source, writers[prefix], options.vocabulary.bos_id)
                summaries[prefix] = writers[prefix].finish(
                    tokenizer_sha256=tokenizer_hash,
                    sources=hasher.result(),
                    options=recorded,
                    notices={ROWS_WITHOUT_BOS: rows_without_bos} if rows_without_bos else {},
                )
    return summaries


def _append_all(source: RowSource, writer: TokenStoreWriter, bos_id: int) -> int:
    """Append every row of `source`; returns how many rows do not begin with bos."""
    rows_without_bos = 0
    for block in source.blocks():
        cuts = cut_samples(block.tokens, block.row_lengths, bos_id)
        writer.append(block.tokens, cuts.sample_lengths, cuts.samples_per_row, block.place)
        rows_without_bos += cuts.rows_without_bos
    return rows_without_bos


@dataclass(frozen=True)
class SampleCuts:
    """Where rows are cut into samples."""

    sample_lengths: np.ndarray  # int64 [samples]
    samples_per_row: np.ndarray  # int64 [R]
    rows_without_bos: int  # rows whose head is a sample without bos


def cut_samples(tokens: np.ndarray, row_lengths: np.ndarray, bos_id: int) -> SampleCuts:
    """Cut rows (`tokens` `[T]`, `row_lengths` `[R]` summing to T, each at least 1) at every bos.

    What comes before the first bos of a row is a sample of its own (the rest of one that a packer cut);
    such rows are accepted and counted, as the original reads them too.
    """
    row_starts = np.cumsum(row_lengths) - row_lengths
    is_start = tokens == bos_id
    rows_without_bos = len(row_starts) - int(np.count_nonzero(is_start[row_starts]))
    is_start[row_starts] = True
    starts = np.flatnonzero(is_start)
    return SampleCuts(
        sample_lengths=np.diff(starts, append=len(tokens)),
        samples_per_row=np.diff(np.searchsorted(starts, row_starts), append=len(starts)),
        rows_without_bos=rows_without_bos,
    )


def _checked_tokenizer_hash(options: StoreOptions) -> str | None:
    if options.tokenizer is None:
        return None
    size = tokenizer_size(options.tokenizer)
    if size != options.vocabulary.size:
        raise DataError(
            f"{options.tokenizer}: the tokenizer has {size} ids, the vocabulary {options.vocabulary.size}; "
            "pass the tokenizer that the rows were made with (an extended one: the directory that "
            "convert_hf_checkpoint.py wrote), or change --vocab or --text-vocab-size"
        )
    return tokenizer_sha256(options.tokenizer)
