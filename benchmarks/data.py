"""Preprocessing and reading beside their peers: same input, results compared, repetitions interleaved.

    python benchmarks/data.py [--tables packed cache speech-text read] [--tokens 50000000] [--workers 1 2]
                              [--read-tokens 1000000000] [--repeats 3] [--directory DIR] [--json FILE]

packed        `preprocess_data.py packed`; the original's stage 4: `load_dataset` of the lines, `map` of split
              and int, `save_to_disk`, with as many processes
cache         `preprocess_data.py cache`; a loop over the dataset into Megatron's `IndexedDatasetBuilder`, a
              document a row, of Python lists (the default of `datasets`) and of numpy arrays (its fastest)
speech-text   `preprocess_data.py speech-text` of a JSONL manifest, two epochs; no peer
read          `TokenStore`; Megatron's `IndexedDataset` and `GPTDataset` over the same files

Ours also hashes input and output and syncs to disk, the peers do neither. CPU time counts all processes. Input
is in the page cache. Needs about 60 bytes of disk a token of --tokens and 2 a token of --read-tokens.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# Worker processes import this file: torch, datasets and Megatron are imported where they are used.
from data_inputs import save_dataset, write_manifest, write_store, write_text
from data_peers import builder_loop, gpt_dataset, read_sequences, stage4
from side_by_side import Contestant, Measured, machine, measure, print_table

from usdm_megatron.cli.preprocess_corpora import SpeechTextFlags
from usdm_megatron.cli.preprocess_ids import CacheFlags, PackedFlags
from usdm_megatron.data.token_store import StorePaths, TokenStore
from usdm_megatron.vocab import USDM_VOCABULARY

Table = Literal["packed", "cache", "speech-text", "read"]
_EPOCHS = 2
_COMPARED_ROWS = 1000


@dataclass(frozen=True)
class Options:
    """What to measure."""

    tables: tuple[Table, ...] = ("packed", "cache", "speech-text", "read")
    tokens: int = 50_000_000
    """Of `packed` and `cache`."""
    workers: tuple[int, ...] = (1, 2)
    utterances: int = 10_000
    read_tokens: int = 1_000_000_000
    batch_tokens: int = 20_000_000
    """Of them, where micro-batches are made."""
    seq_length: int = 8192
    repeats: int = 3
    directory: Path | None = None
    """Where input and results lie meanwhile; the system's temporary directory unless given."""
    json: Path | None = None


def main(options: Options) -> None:
    """Measure and print."""
    print(machine())
    results = {table: run_table(table, options) for table in options.tables}
    if options.json is not None:
        record = {
            "options": {**asdict(options), "directory": str(options.directory), "json": str(options.json)},
            "machine": machine(),
            "measured": {table: [asdict(one) for one in found] for table, found in results.items()},
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def run_table(table: Table, options: Options) -> list[Measured]:
    """Make the input of one table, compare the results, measure, print."""
    contestants_of = {"packed": packed, "cache": cache, "speech-text": speech_text, "read": read}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        results = measure(contestants_of[table](options, Path(directory)), options.repeats)
    print_table(table, results)
    return results


def packed(options: Options, directory: Path) -> list[Contestant]:
    """Text rows → store, and → the original's cache."""
    files = write_text(directory, options.tokens, options.seq_length)
    prefix, peer = str(directory / "store"), directory / "stage4"

    def forget() -> None:
        shutil.rmtree(peer, ignore_errors=True)  # else `datasets` finds its results and is done

    contestants = []
    for workers in options.workers:
        ours = PackedFlags(
            input=files, output_prefix=prefix, workers=workers, seq_length=options.seq_length, overwrite=True
        )
        ours.run()
        store = TokenStore.open(prefix)
        _check_same_rows(store, stage4(files, peer, workers))
        forget()
        theirs = _with_workers(files, peer, workers)
        contestants += [
            Contestant(_group(workers), "packed (ours)", ours.run, store.tokens),
            Contestant(_group(workers), "stage 4 (original)", theirs, store.tokens, forget),
        ]
    return contestants
