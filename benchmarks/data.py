"""Preprocessing and reading beside their peers: same input, results compared, repetitions interleaved.

    python benchmarks/data.py [--tables packed cache speech-text read packing] [--tokens 50000000]
                              [--workers 1 2]
                              [--read-tokens 1000000000] [--repeats 3] [--directory DIR] [--json FILE]

packed        `preprocess_data.py packed`; the original's stage 4: `load_dataset` of the lines, `map` of split
              and int, `save_to_disk`, with as many processes
cache         `preprocess_data.py cache`; a loop over the dataset into Megatron's `IndexedDatasetBuilder`, a
              document a row, of Python lists (the default of `datasets`) and of numpy arrays (its fastest),
              each as it is and with its files synced to disk, as ours are
speech-text   `preprocess_data.py speech-text` of a JSONL manifest, two epochs; no peer
read          `TokenStore`; Megatron's `IndexedDataset` and `GPTDataset` over the same files
packing       best-fit; the original's multipack, with numba (`packing.py`, which has more to set)

Ours also hashes input and output and syncs to disk, the peers do neither unless it is said. CPU time counts
all processes. Input is in the page cache. Needs about 25 bytes of disk a token of --tokens and 2 a token of
--read-tokens.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

# Worker processes import this file: torch, datasets, Megatron and commands are imported where they are used.
import packing as packing_benchmark
from data_inputs import save_dataset, write_manifest, write_store, write_text
from data_peers import builder_loop, gpt_dataset, read_sequences, stage4
from side_by_side import Contestant, Measured, machine, measure, print_table

from usdm_megatron.data.token_store import StorePaths, TokenStore
from usdm_megatron.vocab import USDM_VOCABULARY

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset

Table = Literal["packed", "cache", "speech-text", "read", "packing"]
_EPOCHS = 2
_COMPARED_ROWS = 1000


@dataclass(frozen=True)
class Options:
    """What to measure."""

    tables: tuple[Table, ...] = ("packed", "cache", "speech-text", "read", "packing")
    tokens: int = 50_000_000
    """Of `packed` and `cache`."""
    workers: tuple[int, ...] = (1, 2)
    utterances: int = 10_000
    samples: int = 1_000_000
    """Of `packing`."""
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
    results = {table: run_table(table, options) for table in options.tables if table != "packing"}
    if "packing" in options.tables:
        print("\npacking")
        packing_benchmark.main(packing_benchmark.Options(options.samples, repeats=options.repeats))
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
    from usdm_megatron.cli.preprocess_ids import PackedFlags

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
        contestants += [
            Contestant(_group(workers), "packed (ours)", ours.run, store.tokens),
            Contestant(
                _group(workers),
                "stage 4 (original)",
                partial(stage4, files, peer, workers),
                store.tokens,
                forget,
            ),
        ]
    return contestants


def _group(workers: int) -> str:
    return f"{workers} worker" + "s" * (workers > 1)


def _check_same_rows(store: TokenStore, saved: Path) -> None:
    import datasets

    rows = datasets.load_from_disk(str(saved))["train"].with_format("numpy")
    if len(rows) != store.rows:
        raise AssertionError(f"{store.rows} rows, the original has {len(rows)}")
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(row["input_ids"], store.row(number).tokens)


def cache(options: Options, directory: Path) -> list[Contestant]:
    """The original's cache → store, and → Megatron's files (in one process: it has no workers)."""
    from usdm_megatron.cli.preprocess_ids import CacheFlags

    saved, prefix, peer = directory / "saved", directory / "store", directory / "megatron"
    save_dataset(saved, options.tokens, options.seq_length)
    contestants = []
    for workers in options.workers:
        ours = CacheFlags(
            input=saved,
            output_prefix=str(prefix),
            workers=workers,
            seq_length=options.seq_length,
            overwrite=True,
        )
        ours.run()
        tokens = TokenStore.open(prefix).tokens
        contestants.append(Contestant(_group(workers), "cache (ours)", ours.run, tokens))
        for row_format in ("list", "numpy"):
            theirs = partial(builder_loop, saved, peer, row_format)
            theirs()
            if not filecmp.cmp(StorePaths.of(prefix).bin, StorePaths.of(peer).bin, shallow=False):
                raise AssertionError("the store and Megatron's file hold different tokens")
            name = f"IndexedDatasetBuilder, {row_format}"
            contestants.append(Contestant(_group(workers), name, theirs, tokens))
            synced = partial(builder_loop, saved, peer, row_format, sync=True)
            contestants.append(Contestant(_group(workers), f"{name}, synced", synced, tokens))
    return contestants


def speech_text(options: Options, directory: Path) -> list[Contestant]:
    """A manifest of aligned words and units → store."""
    from usdm_megatron.cli.preprocess_corpora import SpeechTextFlags
    from usdm_megatron.demo.tokenizer import write_mistral_tokenizer

    manifest = directory / "manifest.jsonl"
    write_manifest(manifest, options.utterances)
    tokenizer = write_mistral_tokenizer(directory / "tokenizer")
    prefix = str(directory / "store")
    contestants, identities = [], set()
    for workers in options.workers:
        ours = SpeechTextFlags(
            manifest=(manifest,),
            tokenizer=tokenizer,
            output_prefix=prefix,
            epochs=_EPOCHS,
            workers=workers,
            seq_length=options.seq_length,
            overwrite=True,
        )
        ours.run()
        store = TokenStore.open(prefix)
        identities.add(store.identity)
        name = f"{options.utterances:,} utterances x {_EPOCHS}"
        contestants.append(Contestant(_group(workers), name, ours.run, store.tokens))
    if len(identities) > 1:
        raise AssertionError("the store depends on the number of workers")
    return contestants


def read(options: Options, directory: Path) -> list[Contestant]:
    """A large store opened, read in order, and made into micro-batches of a row."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix, indices = str(directory / "store"), directory / "indices"
    write_store(prefix, options.read_tokens, options.seq_length)
    store, peer = TokenStore.open(prefix), IndexedDataset(prefix)
    _check_same_tokens(store, peer)
    open_peer = partial(gpt_dataset, prefix, indices, options.seq_length, restart_positions=False)
    gpt, restarting = open_peer(), gpt_dataset(prefix, indices, options.seq_length, restart_positions=True)
    rows = min(len(gpt), -(-options.batch_tokens // options.seq_length))
    tokens = rows * options.seq_length
    return [
        Contestant("open", "TokenStore (ours)", partial(TokenStore.open, prefix)),
        Contestant("open", "IndexedDataset", partial(IndexedDataset, prefix)),
        Contestant(
            "open", "GPTDataset, builds its index", open_peer, prepare=partial(shutil.rmtree, indices)
        ),
        Contestant("open", "GPTDataset, index built before", open_peer),
        Contestant("in order", "TokenStore.row (ours)", partial(_read_rows, store), store.tokens),
        Contestant("in order", "IndexedDataset.get", partial(read_sequences, peer), store.tokens),
        Contestant(
            "micro-batch",
            "build_packed_batch (ours)",
            partial(_make_batches, store, rows, options.seq_length),
            int(store.row_lengths()[:rows].sum()),
        ),
        Contestant("micro-batch", "GPTDataset", partial(_get_each, gpt, rows), tokens),
        Contestant(
            "micro-batch", "GPTDataset, positions restart", partial(_get_each, restarting, rows), tokens
        ),
    ]


def _check_same_tokens(store: TokenStore, peer: IndexedDataset) -> None:
    for number in range(min(_COMPARED_ROWS, store.rows)):
        first, end = peer.document_indices[number : number + 2].tolist()
        samples = [peer.get(sample) for sample in range(first, end)]
        np.testing.assert_array_equal(store.row(number).tokens, np.concatenate(samples))


def _read_rows(store: TokenStore) -> None:
    """Every token into a buffer as batches hold them: a view of the map alone reads nothing."""
    buffer = np.empty(store.longest_row, dtype=np.int64)
    for number in range(store.rows):
        tokens = store.row(number).tokens
        buffer[: len(tokens)] = tokens


def _make_batches(store: TokenStore, rows: int, seq_length: int) -> None:
    from usdm_megatron.data.batch import build_packed_batch

    for number in range(rows):
        build_packed_batch(
            [store.row(number)],
            [number],
            seq_length=seq_length,
            vocabulary=USDM_VOCABULARY,
            train_sample_boundaries=False,
            cross_sample_attention="masked",
        )


def _get_each(dataset: GPTDataset, rows: int) -> None:
    for number in range(rows):
        dataset[number]


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
