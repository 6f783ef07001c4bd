"""The loss mask of a store against Megatron's own reader, and every way in which its files can be wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usdm_megatron.data.loss_mask import LossMaskPaths, targets_per_row, without_first_tokens
from usdm_megatron.data.token_store import StorePaths, TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=20, unit_count=7)
TOKENS = [1, 5, 6, 2, 1, 7, 2, 1, 8, 9, 2]  # two samples, then a row of one
MASK = [0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1]
LENGTHS, ROWS = [4, 3, 4], [2, 1]


def write(prefix: Path, mask: list[int] | None = MASK, overwrite: bool = False) -> TokenStore:
    with TokenStoreWriter(
        prefix, VOCABULARY, row_capacity=8, overwrite=overwrite, with_loss_mask=mask is not None
    ) as writer:
        writer.append(
            np.array(TOKENS),
            np.array(LENGTHS),
            np.array(ROWS),
            loss_mask=None if mask is None else np.array(mask, dtype=np.uint8),
        )
        writer.finish()
    return TokenStore.open(prefix)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


ALL_NAMES = {"s.bin", "s.idx", "s.json", "s_loss_mask.bin", "s_loss_mask.idx", "s_loss_mask.targets"}


def test_megatron_reads_the_mask_of_every_sample(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    store = write(tmp_path / "s")
    assert names(tmp_path) == ALL_NAMES
    oracle = IndexedDataset(str(tmp_path / "s_loss_mask"))
    assert [oracle[index].tolist() for index in range(3)] == [MASK[:4], MASK[4:7], MASK[7:]]
    assert oracle.document_indices.tolist() == [0, 2, 3]
    assert [store.row(row).loss_mask.tolist() for row in range(2)] == [MASK[:7], MASK[7:]]
    assert [store.row(row).tokens.tolist() for row in range(2)] == [TOKENS[:7], TOKENS[7:]]
    targets = store.row_targets()
    assert targets is not None and targets.tolist() == [4, 1]
    assert store.summary.loss_mask is not None and store.summary.loss_mask.targets == 5
    with pytest.raises(ValueError, match="read-only"):
        store.row(0).loss_mask[0] = 1
    store.verify()


def test_a_store_without_a_mask_has_none(tmp_path: Path) -> None:
    store = write(tmp_path / "s", None)
    assert names(tmp_path) == {"s.bin", "s.idx", "s.json"}
    assert store.row(0).loss_mask is None and store.row_targets() is None and store.summary.loss_mask is None
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["format_version"] == 1 and "loss_mask" not in record  # as readers without masks know it


def test_only_who_knows_of_masks_reads_a_store_with_one(tmp_path: Path) -> None:
    write(tmp_path / "s")
    assert json.loads((tmp_path / "s.json").read_text())["format_version"] == 2


def test_identity_tells_masks_apart(tmp_path: Path) -> None:
    other = [0, *MASK[2:3], *MASK[1:2], *MASK[3:]]
    stores = [write(tmp_path / "a"), write(tmp_path / "b", other), write(tmp_path / "c", None)]
    assert len({store.identity for store in stores}) == 3


def test_overwriting_leaves_no_mask_of_another_store(tmp_path: Path) -> None:
    write(tmp_path / "s")
    with pytest.raises(DataError, match=r"s_loss_mask.bin, s_loss_mask.idx, .* exists already"):
        write(tmp_path / "s", None)
    write(tmp_path / "s", None, overwrite=True)
    assert names(tmp_path) == {"s.bin", "s.idx", "s.json"}
    write(tmp_path / "s", overwrite=True).verify()
    assert names(tmp_path) == ALL_NAMES


@pytest.mark.parametrize("renamed", range(6))
def test_a_failing_rename_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    done: list[str] = []
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if len(done) == renamed:
            raise OSError(28, "No space left on device", str(target))
        done.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(DataError, match=r"cannot write \(No space left on device\)"):
        write(tmp_path / "s")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, *MASK[1:]], "a sample's first token is no target"),
        ([*MASK[:4], 1, *MASK[5:]], "a sample's first token is no target"),
        ([*MASK[:-1], 2], "0 or 1"),
        (MASK[:-1], "0 or 1 for every token"),
        (None, "for all its rows or for none"),
    ],
)
def test_masks_that_are_none(tmp_path: Path, mask: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):  # noqa: SIM117
        with TokenStoreWriter(tmp_path / "s", VOCABULARY, row_capacity=8, with_loss_mask=True) as writer:
            given = None if mask is None else np.array(mask, dtype=np.uint8)
            writer.append(np.array(TOKENS), np.array(LENGTHS), np.array(ROWS), loss_mask=given)
    assert names(tmp_path) == set()


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=9))
def test_counting_and_clearing_equal_plain_python(samples: list[list[int]]) -> None:
    flat = np.array(sum(samples, []), dtype=np.uint8)
    lengths = np.array(list(map(len, samples)))
    assert targets_per_row(flat, lengths).tolist() == list(map(sum, samples))
    cleared = without_first_tokens(flat, lengths)
    assert cleared.tolist() == sum(([0, *sample[1:]] for sample in samples), [])
    assert flat.tolist() == sum(samples, [])


def test_many_targets_in_a_row_do_not_overflow() -> None:
    assert targets_per_row(np.ones(100_000, dtype=np.uint8), np.array([99_000, 1_000])).tolist() == [
        99_000,
        1_000,
    ]


# --- damaged files


@pytest.mark.parametrize("suffix", ["bin", "idx", "targets"])
def test_a_missing_mask_is_never_taken_for_none(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s")
    (tmp_path / f"s_loss_mask.{suffix}").unlink()
    with pytest.raises(
        DataError, match=rf"s_loss_mask.{suffix} not found, but its tokens come with a loss mask"
    ):
        TokenStore.open(tmp_path / "s")


# offsets as in test_token_store.py: dtype 17, sequences 18, lengths 34 (3 of them), pointers 46, rows 70
@pytest.mark.parametrize(
    ("name", "offset", "data", "message"),
    [
        ("idx", 17, b"\x08", r"dtype code is 8, expected 1 \(uint8\)"),
        ("idx", 34, struct.pack("<ii", 3, 4), "pointers are not the cumulated"),
        ("idx", 34, struct.pack("<iiiqqq", 3, 4, 4, 0, 3, 7), "describes other samples or rows than .*s.idx"),
        ("idx", 78, struct.pack("<q", 1), "describes other samples or rows than .*s.idx"),
        ("bin", 11, b"x", "12 bytes, but s_loss_mask.idx describes 11 tokens"),
        ("targets", 8, b"\0\0\0\0", "12 bytes, but the counts of 2 rows take 8"),
        ("targets", 0, struct.pack("<i", 7), "counts 7 targets in row 0 of 7 tokens"),
        ("targets", 0, struct.pack("<i", -1), "counts -1 targets in row 0"),
        ("targets", 0, struct.pack("<i", 5), "counts 6 targets, the store's .json records 5"),
    ],
)
def test_what_opening_finds(tmp_path: Path, name: str, offset: int, data: bytes, message: str) -> None:
    write(tmp_path / "s")
    path = tmp_path / f"s_loss_mask.{name}"
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"s_loss_mask.{name}: .*{message}"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "offset", "data", "messages"),
    [
        ("bin", 1, b"\0", ["bin: sha256 is", "targets: does not count the targets of s_loss_mask.bin"]),
        ("bin", 1, b"\5", ["bin: sha256 is", "bin: holds 5, a mask is 0 or 1"]),
        ("targets", 0, struct.pack("<ii", 3, 2), ["targets: sha256 is", "targets: does not count"]),
    ],
)
def test_what_verify_finds(tmp_path: Path, name: str, offset: int, data: bytes, messages: list[str]) -> None:
    write(tmp_path / "s")
    path = tmp_path / f"s_loss_mask.{name}"
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))
    with pytest.raises(DataError) as caught:
        TokenStore.open(tmp_path / "s").verify()
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages, strict=True):
        assert f"s_loss_mask.{message}" in problem


@pytest.mark.parametrize(
    "record",
    [None, 5, {}, {"targets": 5}, {"targets": "5", "bin_sha256": "", "idx_sha256": "", "targets_sha256": ""},
     {"targets": 5, "bin_sha256": 1, "idx_sha256": "", "targets_sha256": ""},
     {"targets": 5, "bin_sha256": "", "idx_sha256": "", "targets_sha256": "", "more": 1}],
)  # fmt: skip
def test_summaries_that_are_none(tmp_path: Path, record: object) -> None:
    write(tmp_path / "s")
    path = tmp_path / "s.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss_mask": record}))
    with pytest.raises(DataError, match="s.json: a field is missing or malformed"):
        TokenStore.open(tmp_path / "s")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_mask_is_an_error_or_the_true_one(tmp_path: Path, data: st.DataObject) -> None:
    prefix = tmp_path / "fuzzed"
    write(prefix, overwrite=True)
    path = data.draw(st.sampled_from([*LossMaskPaths.of(prefix), StorePaths.of(prefix).json]))
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
    assert [store.row(row).loss_mask.tolist() for row in range(2)] == [MASK[:7], MASK[7:]]
    targets = store.row_targets()
    assert targets is not None and targets.tolist() == [4, 1]
