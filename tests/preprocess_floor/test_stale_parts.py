"""After a run that failed: mended input and other options bar no way, and no parts are mixed or lost."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from tests.preprocess_floor.line_source import VOCABULARY, LineSource
from usdm_megatron.data.file_writing import open_locked
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.merge import merge_parts
from usdm_megatron.preprocess.parts_plan import MergeOptions, Shard
from usdm_megatron.preprocess.stores import SampleOptions, StoreOptions, WorkOptions, write_samples

GOOD = [f"u{number} 0 {5 + number % 7}" for number in range(8)]


def write(
    path: Path, *lines: str, overwrite: bool = False, shard: Shard | None = None, **merge: object
) -> int:
    """Samples of the store `P` beside `path`, which gets `lines` if there are any."""
    if lines:
        path.write_text("\n".join(lines))
    prefix = path.with_name("P")
    write_samples(
        "fake",
        {"": LineSource(path)},
        str(prefix),
        StoreOptions(30, VOCABULARY, overwrite=overwrite),
        SampleOptions(MergeOptions(**merge), id_rule="once", input_holds_ids=False),
        WorkOptions(shard=shard),
    )
    return 0 if shard else TokenStore.open(prefix).summary.samples


@pytest.mark.parametrize("bad_line", [0, 7])  # before and behind parts that are whole
@pytest.mark.parametrize("mended", ["w 0 5", "w 0 15"])  # of another size, of the same
def test_mended_input_needs_no_flag(tmp_path: Path, bad_line: int, mended: str) -> None:
    lines = [*GOOD]
    lines[bad_line] = "broken"
    with pytest.raises(DataError, match=f"in.txt line {bad_line + 1}: broken"):
        write(tmp_path / "in.txt", *lines)
    lines[bad_line] = mended
    assert write(tmp_path / "in.txt", *lines) == 8
    assert not (tmp_path / "P.parts").exists()


def test_other_options_where_nothing_is_whole_yet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: broken"):
        write(tmp_path / "in.txt", "broken", seed=1)
    with pytest.raises(DataError, match="line 1: broken"):
        write(tmp_path / "in.txt", seed=2)
    assert write(tmp_path / "in.txt", *GOOD, seed=3) == 8


def test_whole_parts_of_other_options_are_given_up_by_a_flag_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--strict allows no rejection"):
        write(tmp_path / "in.txt", *GOOD, "x bad", strict=True)
    there = {path.name for path in (tmp_path / "P.parts").iterdir()}
    with pytest.raises(DataError, match=r"merge.strict was true, is false\. .*or pass --overwrite"):
        write(tmp_path / "in.txt")
    assert {path.name for path in (tmp_path / "P.parts").iterdir()} == there
    assert write(tmp_path / "in.txt", overwrite=True) == 8


def test_shards_never_discard(tmp_path: Path) -> None:
    """Another shard may be making the parts that look stale."""
    write(tmp_path / "in.txt", *GOOD, shard=Shard(1, 2))  # the one that hashes the file
    (tmp_path / "in.txt").write_text("\n".join([*GOOD, "u9 0 5"]))
    with pytest.raises(DataError, match=r"in.txt had 57 bytes, has 64\. .*with --shard: remove the dir"):
        write(tmp_path / "in.txt", shard=Shard(0, 2), overwrite=True)
    assert (tmp_path / "P.parts" / "part-00001.json").exists()


def test_parts_that_another_process_is_making_stay(tmp_path: Path) -> None:
    write(tmp_path / "in.txt", *GOOD, shard=Shard(1, 2))
    with (
        contextlib.closing(open_locked(tmp_path / "P.parts" / "shard-1-of-2.lock", "other")),
        pytest.raises(DataError, match="shard-1-of-2: another process is writing it now"),
    ):
        write(tmp_path / "in.txt", seed=1, overwrite=True)
    assert (tmp_path / "P.parts" / "part-00001.json").exists()
    assert write(tmp_path / "in.txt", seed=1, overwrite=True) == 8


def test_a_report_is_not_replaced_unasked(tmp_path: Path) -> None:
    """Said before any work, also to a shard; by `merge` where it came later."""
    (tmp_path / "P_report.json").write_text("mine")
    for shard in (None, Shard(0, 1)):
        with pytest.raises(DataError, match="P_report.json exists already; pass --overwrite"):
            write(tmp_path / "in.txt", *GOOD, shard=shard)
        assert not (tmp_path / "P.parts").exists()
    (tmp_path / "P_report.json").unlink()
    write(tmp_path / "in.txt", shard=Shard(0, 1))
    (tmp_path / "P_report.json").write_text("mine")
    with pytest.raises(DataError, match="P_report.json exists already; pass --overwrite"):
        merge_parts(str(tmp_path / "P"), WorkOptions().executor)
    assert (tmp_path / "P_report.json").read_text() == "mine"
    assert write(tmp_path / "in.txt", overwrite=True) == 8
    assert json.loads((tmp_path / "P_report.json").read_text())["not_listed"] == 0


def test_a_json_that_is_of_no_store_is_never_replaced(tmp_path: Path) -> None:
    """Lengths of stage 2, a manifest."""
    (tmp_path / "P.json").write_text("[5, 6]")
    with pytest.raises(DataError, match="P.json: there is no P.bin to it, so it is of no token store"):
        write(tmp_path / "in.txt", *GOOD, overwrite=True)
    assert (tmp_path / "P.json").read_text() == "[5, 6]"
    assert not (tmp_path / "P.parts").exists()
