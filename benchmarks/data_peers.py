"""What `data.py` compares with, in the fewest lines that do it: the original's stage 4, and Megatron."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from usdm_megatron.data.token_store import StorePaths
from usdm_megatron.vocab import USDM_VOCABULARY


def stage4(files: tuple[Path, ...], directory: Path, workers: int) -> Path:
    """The original's stage 4 for one split, with `workers` processes instead of 16; where it saved."""
    import datasets

    datasets.disable_progress_bars()
    processes = None if workers == 1 else workers
    names = [str(file) for file in files]
    rows = datasets.load_dataset(
        "text", data_files={"train": names}, cache_dir=str(directory / "cache"), num_proc=processes
    )
    rows.map(_to_ids, num_proc=processes).save_to_disk(str(directory / "saved"))
    return directory / "saved"


def _to_ids(row: dict[str, Any]) -> dict[str, Any]:
    row["input_ids"] = [int(word) for word in row["text"].split(" ")]
    del row["text"]
    return row


def builder_loop(
    saved: Path, prefix: Path, row_format: Literal["list", "numpy"], *, sync: bool = False
) -> None:
    """A dataset on disk into Megatron's files, a document a row, not cut into samples."""
    import datasets
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rows = datasets.load_from_disk(str(saved))
    paths = StorePaths.of(prefix)
    builder = IndexedDatasetBuilder(str(paths.bin), dtype=np.uint16)
    for row in rows.with_format("numpy") if row_format == "numpy" else rows:
        builder.add_document(row["input_ids"], [len(row["input_ids"])])
    builder.finalize(str(paths.idx))
    for path in (paths.bin, paths.idx) if sync else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read_sequences(dataset: Any) -> None:
    """Every token of an `IndexedDataset` into a buffer, a sequence at a time."""
    buffer = np.empty(int(dataset.sequence_lengths.max()), dtype=np.int64)
    for number in range(len(dataset)):
        tokens = dataset.get(number)
        buffer[: len(tokens)] = tokens


def gpt_dataset(prefix: str, indices: Path, seq_length: int, *, restart_positions: bool) -> Any:
    """One epoch of Megatron's `GPTDataset`, its index in `indices`; without attention masks (S x S each)."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    vocabulary = USDM_VOCABULARY
    tokenizer = SimpleNamespace(
        vocab_size=vocabulary.size,
        eod=vocabulary.eos_id,
        pad=vocabulary.pad_id,
        unique_identifiers={"class": "usdm"},
    )
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        split="1",
        blend=([prefix], None),
        path_to_cache=str(indices),
        tokenizer=tokenizer,
        reset_position_ids=restart_positions,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sequences = GPTDataset.build_low_level_dataset(prefix, config)
    order = np.arange(len(sequences), dtype=np.int32)
    return GPTDataset(sequences, prefix, order, None, Split.train, config)
