"""The token store against Megatron's own reader, and every way in which a file can be wrong."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usdm_megatron.data import token_store_writer
from usdm_megatron.data.token_store import StorePaths, TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

SPEECHLESS_WIDE = Vocabulary(text_size=70_000, unit_count=0)  # needs int32


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(USDM_VOCABULARY, np.uint16), (SPEECHLESS_WIDE, np.int32), (Vocabulary(65_536, 0), np.uint16)],
)
def test_megatron_reads_the_same_rows_and_samples(
    write_store: Callable[..., TokenStore],
    make_rows: Callable[..., list],
    vocabulary: Vocabulary,
    dtype: type,
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = make_rows(17, vocabulary=vocabulary)
    rows[5] = [[vocabulary.size - 1, 0]]  # both ends of the range
    store = write_store(rows, vocabulary=vocabulary)
    oracle = IndexedDataset(store.prefix)

    assert oracle.index.dtype == dtype
    assert len(oracle) == store.summary.samples == sum(map(len, rows))
    document_indices = oracle.document_indices
    assert len(document_indices) - 1 == store.rows == len(rows)
    for row_id, row in enumerate(rows):
        first, end = document_indices[row_id], document_indices[row_id + 1]
        theirs = [np.array(oracle[i]).tolist() for i in range(first, end)]
        ours = store.row(row_id)
        assert theirs == row
        assert ours.tokens.tolist() == [token for sample in row for token in sample]
        assert ours.sample_lengths.tolist() == [len(sample) for sample in row]
        assert ours.tokens.dtype == dtype
    del oracle


def test_a_store_written_by_megatron_has_our_bytes(
    tmp_path: Path, write_store: Callable[..., TokenStore], make_rows: Callable[..., list]
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rows = make_rows(9)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for row in rows:
        builder.add_document(
            torch.tensor([token for sample in row for token in sample]), [len(sample) for sample in row]
        )
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_store(rows, "ours")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_summary_counts(write_store: Callable[..., TokenStore]) -> None:
    store = write_store([[[1, 5, 2], [1, 28, 2]], [[1, 2]]], row_capacity=8)
    summary = store.summary
    assert (summary.rows, summary.samples, summary.tokens) == (2, 3, 8)
    assert (summary.longest_row, summary.largest_id) == (6, 28)
    assert summary.fill == 0.5
    assert json.loads(Path(f"{store.prefix}.json").read_text())["fill"] == 0.5
    assert (store.rows, store.tokens, store.longest_row, len(store)) == (2, 8, 6, 2)
    assert store.row_lengths().tolist() == [6, 2]
    assert store.sample_lengths().tolist() == [3, 3, 2]
    assert [chunk.tolist() for chunk in store.token_chunks(5)] == [[1, 5, 2, 1, 28], [2, 1, 2]]
    store.verify()


def test_bytes_are_deterministic_and_independent_of_blocks_and_place(
    tmp_path: Path, write_store: Callable[..., TokenStore], make_rows: Callable[..., list]
) -> None:
    rows = make_rows(11)
    first = write_store(rows, "a", block=2)
    (tmp_path / "elsewhere").mkdir()
    second = write_store(rows, "elsewhere/b", block=100)
    for one, other in zip(StorePaths.of(first.prefix), StorePaths.of(second.prefix), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert first.identity == second.identity


def test_identity_tells_contents_apart(write_store: Callable[..., TokenStore]) -> None:
    stores = [
        write_store([[[1, 5, 2], [1, 2]]], "a"),
        write_store([[[1, 6, 2], [1, 2]]], "b"),  # another token
        write_store([[[1, 5, 2, 1, 2]]], "c"),  # another cut into samples
        write_store([[[1, 5, 2]], [[1, 2]]], "d"),  # another cut into rows
    ]
    assert len({store.identity for store in stores}) == 4


def test_rows_outlive_the_store_and_are_read_only(write_store: Callable[..., TokenStore]) -> None:
    row = write_store([[[1, 5, 2]]]).row(0)
    gc.collect()
    assert row.tokens.tolist() == [1, 5, 2]
    with pytest.raises(ValueError, match="read-only"):
        row.tokens[0] = 0


@pytest.mark.parametrize("row_id", [-1, 2])
def test_rows_outside_the_store_are_index_errors(write_store: Callable[..., TokenStore], row_id: int) -> None:
    with pytest.raises(IndexError, match=f"row {row_id} of 2"):
        write_store([[[1, 2]], [[1, 2]]]).row(row_id)


# --- bad input to the writer


@pytest.mark.parametrize(
    ("tokens", "found"),
    [([1, 5, 2, 1, 30, 2], "id 30"), ([1, 5, 2, 1, -1, 2], "id -1"), ([1] * 5 + [70_000], "id 70000")],
)
def test_ids_outside_the_vocabulary_name_row_and_id(
    tmp_path: Path, vocabulary: Vocabulary, tokens: list[int], found: str
) -> None:
    with (
        pytest.raises(DataError, match=rf"row 5 \(here, 2\) holds {found}, outside the vocabulary of 30 ids"),
        TokenStoreWriter(tmp_path / "s", vocabulary, row_capacity=10) as writer,
    ):
        writer.append(np.array([1, 2] * 3), np.array([2, 2, 2]), np.array([1, 1, 1]))
        writer.append(
            np.array([1, 2, *tokens]), np.array([2, 3, 3]), np.array([1, 1, 1]), lambda row: f"here, {row}"
        )
    assert names(tmp_path) == set()


def test_a_row_longer_than_the_capacity_names_row_and_length(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with (
        pytest.raises(DataError, match=r"row 1 holds 7 tokens, more than --seq-length 6; .* with --repack"),
        TokenStoreWriter(tmp_path / "s", vocabulary, row_capacity=6) as writer,
    ):
        writer.append(np.full(13, 1), np.array([6, 3, 4]), np.array([1, 2]))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("tokens", "lengths", "per_row"),
    [
        ([1, 2, 3], [2], [1]),
        ([1, 2], [2], [2]),
        ([1, 2], [2, 0], [1, 1]),
        ([1, 2], [2], [1, 0]),
        ([], [], []),
    ],
)
def test_blocks_that_contradict_themselves(
    tmp_path: Path, vocabulary: Vocabulary, tokens: list[int], lengths: list[int], per_row: list[int]
) -> None:
    with (
        pytest.raises((ValueError, IndexError)),
        TokenStoreWriter(tmp_path / "s", vocabulary, row_capacity=6) as writer,
    ):
        writer.append(np.array(tokens), np.array(lengths), np.array(per_row))
    assert names(tmp_path) == set()


def test_an_empty_store_is_refused(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with (
        pytest.raises(DataError, match="holds no rows; an empty store cannot be trained on"),
        TokenStoreWriter(tmp_path / "s", vocabulary, row_capacity=6) as writer,
    ):
        writer.finish()
    assert names(tmp_path) == set()


def test_leaving_without_finish_is_our_bug(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with (
        pytest.raises(RuntimeError, match="without finish"),
        TokenStoreWriter(tmp_path / "s", vocabulary, row_capacity=6) as writer,
    ):
        writer.append(np.array([1, 2]), np.array([2]), np.array([1]))
    assert names(tmp_path) == set()


# --- existing output, interrupted and concurrent writers


def write_one(prefix: Path, vocabulary: Vocabulary, token: int, overwrite: bool = False) -> None:
    with TokenStoreWriter(prefix, vocabulary, row_capacity=6, overwrite=overwrite) as writer:
        writer.append(np.array([1, token]), np.array([2]), np.array([1]))
        writer.finish()


def test_existing_output_is_refused_unless_overwrite(tmp_path: Path, vocabulary: Vocabulary) -> None:
    prefix = tmp_path / "s"
    write_one(prefix, vocabulary, 5)
    with pytest.raises(DataError, match=r"s.bin, s.idx, s.json exists already; pass --overwrite"):
        write_one(prefix, vocabulary, 6)
    assert TokenStore.open(prefix).row(0).tokens.tolist() == [1, 5]
    write_one(prefix, vocabulary, 6, overwrite=True)
    assert TokenStore.open(prefix).row(0).tokens.tolist() == [1, 6]
    assert names(tmp_path) == {"s.bin", "s.idx", "s.json"}


def test_a_failed_overwrite_leaves_the_old_store(tmp_path: Path, vocabulary: Vocabulary) -> None:
    prefix = tmp_path / "s"
    write_one(prefix, vocabulary, 5)
    with pytest.raises(DataError, match="id 99"):
        write_one(prefix, vocabulary, 99, overwrite=True)
    store = TokenStore.open(prefix)
    store.verify()
    assert store.row(0).tokens.tolist() == [1, 5]
    assert names(tmp_path) == {"s.bin", "s.idx", "s.json"}


def test_a_foreign_bin_is_not_replaced_unasked(tmp_path: Path, vocabulary: Vocabulary) -> None:
    (tmp_path / "s.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match="s.bin exists already"):
        write_one(tmp_path / "s", vocabulary, 5)
    assert (tmp_path / "s.bin").read_bytes() == b"precious"
    assert names(tmp_path) == {"s.bin"}


def test_two_writers_of_one_store(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with TokenStoreWriter(tmp_path / "s", vocabulary, row_capacity=6) as writer:
        with pytest.raises(DataError, match="another process is writing it now"):
            write_one(tmp_path / "s", vocabulary, 6)
        writer.append(np.array([1, 5]), np.array([2]), np.array([1]))
        writer.finish()
    assert TokenStore.open(tmp_path / "s").row(0).tokens.tolist() == [1, 5]


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_a_failing_rename_publishes_nothing(
    tmp_path: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    done: list[str] = []
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if len(done) == renamed:
            raise OSError(28, "No space left on device", str(target))
        done.append(str(target))
        replace(source, target)

    monkeypatch.setattr(token_store_writer.os, "replace", failing)
    if renamed == 3:
        write_one(tmp_path / "s", vocabulary, 5)
        assert names(tmp_path) == {"s.bin", "s.idx", "s.json"}
        return
    with pytest.raises(DataError, match=r"cannot write \(No space left on device\)"):
        write_one(tmp_path / "s", vocabulary, 5)
    assert names(tmp_path) == set()


KILLED_WRITER = """
import os, signal, sys
import numpy as np
from usdm_megatron.data import token_store_writer as module
from usdm_megatron.vocab import Vocabulary

stage, overwrite = sys.argv[2], sys.argv[3] == "overwrite"
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
real, count = os.replace, 0
def replace(source, target):
    global count
    if stage == f"rename {count}":
        kill()
    count += 1
    real(source, target)
module.os.replace = replace
with module.TokenStoreWriter(
    sys.argv[1], Vocabulary(text_size=20, unit_count=7), row_capacity=6, overwrite=overwrite
) as writer:
    writer.append(np.array([1, 5]), np.array([2]), np.array([1]))
    if stage == "append":
        kill()
    writer.finish()
    if stage == "finish":
        kill()
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stage", ["append", "finish", "rename 0", "rename 1", "rename 2"])
def test_a_killed_writer_leaves_no_store_and_a_rerun_gives_the_same_bytes(
    tmp_path: Path, vocabulary: Vocabulary, stage: str, overwrite: bool
) -> None:
    prefix = tmp_path / "s"
    if overwrite:
        write_one(prefix, vocabulary, 6)
    mode = "overwrite" if overwrite else "new"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(prefix), stage, mode],
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == -signal.SIGKILL
    if overwrite and stage in ("append", "finish"):
        assert TokenStore.open(prefix).row(0).tokens.tolist() == [1, 6]  # the old store, untouched
    else:
        with pytest.raises(DataError):
            TokenStore.open(prefix)
    write_one(prefix, vocabulary, 5, overwrite=overwrite)
    write_one(tmp_path / "reference", vocabulary, 5)
    for one, other in zip(StorePaths.of(prefix), StorePaths.of(tmp_path / "reference"), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert len(names(tmp_path)) == 6


def test_longer_remains_of_a_killed_writer_leave_no_trace(tmp_path: Path, vocabulary: Vocabulary) -> None:
    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"s.{suffix}.tmp").write_bytes(b"x" * 10_000)
    write_one(tmp_path / "s", vocabulary, 5)
    TokenStore.open(tmp_path / "s").verify()
    assert names(tmp_path) == {"s.bin", "s.idx", "s.json"}


def test_an_unwritable_directory(tmp_path: Path, vocabulary: Vocabulary) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write .* free space, or choose another --output-prefix"):
        write_one(tmp_path / "file" / "s", vocabulary, 5)


# --- damaged files


def damage_idx(prefix: str, offset: int, data: bytes) -> None:
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def test_missing_files_say_what_to_do(tmp_path: Path, write_store: Callable[..., TokenStore]) -> None:
    store = write_store([[[1, 2]]])
    with pytest.raises(DataError, match=r"no token store, x.bin, x.idx, x.json not found; .* without .bin"):
        TokenStore.open(tmp_path / "x")
    Path(f"{store.prefix}.json").unlink()
    with pytest.raises(DataError, match=r"store.json: missing, .* tools/preprocess_data.py` .* --overwrite"):
        TokenStore.open(store.prefix)
    Path(f"{store.prefix}.idx").unlink()
    with pytest.raises(DataError, match="store.idx, store.json not found"):
        TokenStore.open(store.prefix)


@pytest.mark.parametrize("change", [-1, 1, -10])
def test_a_bin_of_another_size(write_store: Callable[..., TokenStore], change: int) -> None:
    store = write_store([[[1, 5, 6, 7, 2]], [[1, 2]]])
    path = Path(f"{store.prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(
        DataError,
        match=rf"store.bin: {14 + change} bytes, but store.idx describes 7 tokens of 2 bytes = 14: trunc",
    ):
        TokenStore.open(store.prefix)


# offsets: magic 0, version 9, dtype 17, sequences 18, documents 26, lengths 34 (3 of them),
# pointers 46, document indices 70
@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "magic is"),
        (9, struct.pack("<Q", 2), "version is 2, this package reads 1"),
        (17, b"\x05", "dtype code is 5, expected 8"),
        (18, struct.pack("<Q", 0), "0 samples in 2 rows: the store is empty"),
        (18, struct.pack("<Q", 4), "94 bytes, but 4 samples and 2 rows take 106"),
        (18, struct.pack("<Q", 2**63), "94 bytes, but 9223372036854775808 samples"),
        (26, struct.pack("<Q", 2**64 - 1), "94 bytes, but 3 samples and"),
        (38, struct.pack("<i", 0), "sample 1 has 0 tokens, the least is 1"),
        (38, struct.pack("<i", -4), "sample 1 has -4 tokens"),
        (46, struct.pack("<q", 2), "pointers are not the cumulated"),
        (54, struct.pack("<q", 2), "pointers are not the cumulated"),
        (70, struct.pack("<q", 1), "row starts do not rise from 0 to 3"),
        (78, struct.pack("<q", 0), "row starts do not rise"),
        (78, struct.pack("<q", 2**40), "row starts do not rise"),
        (78, struct.pack("<q", -1), "row starts do not rise"),
        (86, struct.pack("<q", 2), "row starts do not rise"),
        (86, struct.pack("<q", 4), "row starts do not rise from 0 to 3"),
        (78, struct.pack("<qq", 1, 2), "row starts do not rise from 0 to 3"),  # the last sample in no row
    ],
)
def test_each_field_of_the_index(
    write_store: Callable[..., TokenStore], offset: int, data: bytes, message: str
) -> None:
    store = write_store([[[1, 5, 2], [1, 2]], [[1, 6, 2]]])
    damage_idx(store.prefix, offset, data)
    with pytest.raises(DataError, match=f"store.idx: .*{message}"):
        TokenStore.open(store.prefix)


def test_a_header_cut_short(write_store: Callable[..., TokenStore]) -> None:
    store = write_store([[[1, 2]]])
    Path(f"{store.prefix}.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(DataError, match="7 bytes, shorter than the header of 34"):
        TokenStore.open(store.prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "records rows 3, but store.bin and store.idx hold 2"),
        ({"samples": 9}, "records samples 9"),
        ({"tokens": 9}, "records tokens 9"),
        ({"longest_row": 9}, "records longest_row 9"),
        ({"bin_bytes": 9}, "records bin_bytes 9"),
        ({"idx_bytes": 9}, "records idx_bytes 9"),
        ({"largest_id": 30}, "records largest_id 30, outside its vocabulary of 30"),
        (
            {"vocabulary": {"text_size": 70000, "unit_count": 0, "bos_id": 1, "eos_id": 2}},
            "tokens are uint16, but 70000 ids are stored as int32",
        ),
        ({"vocabulary": {"text_size": 5}}, "a field is missing or malformed"),
        ({"vocabulary": 7}, "a field is missing or malformed"),
        ({"rows": "2"}, "a field is missing or malformed"),
        ({"rows": -2}, "a field is missing or malformed"),
        ({"rows": True}, "a field is missing or malformed"),
        ({"row_capacity": 0}, "a field is missing or malformed"),
        ({"bin_sha256": None}, "a field is missing or malformed"),
        ({"tokenizer_sha256": 5}, "a field is missing or malformed"),
        ({"sources": [{"name": "x"}]}, "a field is missing or malformed"),
        ({"options": 3}, "a field is missing or malformed"),
        ({"format_version": 3}, "format version 3, this package reads 1 and 2"),
        ({"format_version": 2}, "a field is missing or malformed"),  # and no loss mask
        ({"loss_mask": {"targets": 1}}, "a field is missing or malformed"),
    ],
)
def test_a_summary_that_disagrees(
    write_store: Callable[..., TokenStore], changes: dict[str, object], message: str
) -> None:
    store = write_store([[[1, 5, 2], [1, 2]], [[1, 6, 2]]])
    path = Path(f"{store.prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=f"store.(json|idx): .*{message}"):
        TokenStore.open(store.prefix)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_a_summary_that_is_none(write_store: Callable[..., TokenStore], content: bytes) -> None:
    store = write_store([[[1, 2]]])
    Path(f"{store.prefix}.json").write_bytes(content)
    with pytest.raises(DataError, match="store.json: (not JSON|not the summary)"):
        TokenStore.open(store.prefix)


def test_bin_and_idx_of_different_stores_of_one_size(write_store: Callable[..., TokenStore]) -> None:
    one = write_store([[[1, 5, 2], [1, 2]]], "one")
    other = write_store([[[1, 2], [1, 5, 2]]], "other")
    Path(f"{one.prefix}.idx").write_bytes(Path(f"{other.prefix}.idx").read_bytes())
    with pytest.raises(DataError, match=r"one.idx: sha256 is .*, one.json records .*: the file changed"):
        TokenStore.open(one.prefix).verify()


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (40, "id 40 is outside the vocabulary of 30 ids"),
        (27, "largest id is 27, store.json records 19"),
        (5, "sha256"),
    ],
)
def test_verify_reads_every_token(write_store: Callable[..., TokenStore], token: int, message: str) -> None:
    store = write_store([[[1, 19, 6, 2]], [[1, 7, 2]]])
    path = Path(f"{store.prefix}.bin")
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[5] = token
    tokens.tofile(path)
    damaged = TokenStore.open(store.prefix)  # sizes agree: opening reads no tokens
    with pytest.raises(DataError, match=message) as caught:
        damaged.verify()
    assert "sha256" in caught.value.problems[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_store_is_an_error_or_its_true_rows(tmp_path: Path, data: st.DataObject) -> None:
    """Flip, cut or extend any file anywhere: opening and verifying raises `DataError`, nothing else."""
    prefix = tmp_path / "fuzzed"
    with TokenStoreWriter(prefix, Vocabulary(20, 7), row_capacity=6, overwrite=True) as writer:
        writer.append(np.array([1, 5, 2, 1, 2, 1, 6, 2]), np.array([3, 2, 3]), np.array([2, 1]))
        writer.finish()
    path = data.draw(st.sampled_from(list(StorePaths.of(prefix))))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    else:
        size = data.draw(st.integers(0, len(content) + 20))
        content = content[:size] + bytes(max(0, size - len(content)))
    path.write_bytes(bytes(content))
    try:
        store = TokenStore.open(prefix)
        store.verify()
    except DataError:
        return
    assert [store.row(i).tokens.tolist() for i in range(store.rows)] == [[1, 5, 2, 1, 2], [1, 6, 2]]
    assert [store.row(i).sample_lengths.tolist() for i in range(store.rows)] == [[3, 2], [3]]


def test_opening_reads_no_tokens(tmp_path: Path) -> None:
    """10^9 tokens open in under 0.1 s: the index of 1.1 M samples is real, the tokens are a hole."""
    samples, rows = 1_064_000, 122_000
    lengths = np.full(samples, 940, dtype=np.int32)
    pointers = np.arange(samples, dtype=np.int64) * 940 * 2
    row_samples = np.linspace(0, samples, rows + 1).astype(np.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, samples, rows + 1)
    index = header + lengths.tobytes() + pointers.tobytes() + row_samples.tobytes()
    tokens = samples * 940
    assert tokens > 10**9
    write_one(tmp_path / "big", USDM_VOCABULARY, 5)
    record = json.loads((tmp_path / "big.json").read_text()) | {
        "rows": rows,
        "samples": samples,
        "tokens": tokens,
        "longest_row": int(np.diff(row_samples).max()) * 940,
        "row_capacity": 10_000,
        "bin_bytes": 2 * tokens,
        "idx_bytes": len(index),
    }
    (tmp_path / "big.json").write_text(json.dumps(record))
    (tmp_path / "big.idx").write_bytes(index)
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(2 * tokens)
    durations_s = []
    for _ in range(5):
        started_at = time.perf_counter()
        store = TokenStore.open(tmp_path / "big")
        durations_s.append(time.perf_counter() - started_at)
    assert len(store.row(rows - 1).tokens) == store.row_lengths()[-1]
    print(f"opened 1e9 tokens in {min(durations_s) * 1e3:.1f} ms")
    assert min(durations_s) < 0.1
