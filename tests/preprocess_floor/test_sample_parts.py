"""Parts on disk: what is made, what is made again, what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.preprocess_floor.line_source import VOCABULARY, LineSource
from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.preprocess import parts_plan, plan_agreement, sample_parts
from usdm_megatron.preprocess.executors import SerialExecutor
from usdm_megatron.preprocess.part_files import PartFiles, open_part, write_part
from usdm_megatron.preprocess.parts_plan import Input, MergeOptions, PartsPlan, Shard, StorePlan
from usdm_megatron.preprocess.sample_parts import make_parts
from usdm_megatron.preprocess.source_hashes import hash_file, hash_files

LINES = [f"u{number} 0 {5 + number % 7}" for number in range(20)]

ALL = Shard()


@pytest.fixture
def source(tmp_path: Path) -> LineSource:
    (tmp_path / "in.txt").write_text("\n".join(LINES))
    return LineSource(tmp_path / "in.txt")


def plan_of(source: LineSource, **changes: object) -> PartsPlan:
    plan = PartsPlan(
        "fake",
        {"": StorePlan.of(Input.of(source))},
        seq_length=30,
        vocabulary=VOCABULARY,
        merge=MergeOptions(),
    )
    return replace(plan, **changes)


def make(source: LineSource, directory: Path, shard: Shard = ALL, **changes: object) -> list[int]:
    """Make parts; the numbers of those that were asked of the source."""
    asked: list[int] = []

    class Asked(LineSource):
        def make(self, part: int):  # noqa: ANN202
            asked.append(part // self.lines_per_part)
            return super().make(part)

    spy = Asked(source.path, source.lines_per_part, source.with_mask)
    make_parts(
        {"": Input.of(spy)},
        plan_of(source, **changes),
        directory,
        SerialExecutor(),
        shard,
        lambda done, of: None,
    )
    return asked


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix != ".lock"}


def test_a_rerun_makes_nothing(source: LineSource, tmp_path: Path) -> None:
    assert make(source, tmp_path / "P") == list(range(7))
    before = contents(tmp_path / "P")
    assert make(source, tmp_path / "P") == []
    assert contents(tmp_path / "P") == before
    assert len(before) == 2 * 7 + 2  # parts, plan, sources


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_shards_make_every_part_once_in_any_order(source: LineSource, tmp_path: Path, count: int) -> None:
    make(source, tmp_path / "P")
    made = [make(source, tmp_path / "Q", Shard(index, count)) for index in reversed(range(count))]
    assert sorted(sum(made, [])) == list(range(7))
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert contents(tmp_path / "Q") == contents(tmp_path / "P")


@pytest.mark.parametrize("name", ["part-00003.bin", "part-00003.json"])
@pytest.mark.parametrize("damage", ["remove", "cut", "flip"])
def test_a_damaged_part_is_made_again(source: LineSource, tmp_path: Path, name: str, damage: str) -> None:
    make(source, tmp_path / "P")
    before = contents(tmp_path / "P")
    path = tmp_path / "P" / name
    content = before[name]
    damaged = {
        "remove": b"",
        "cut": content[:-1],
        "flip": content[:9] + bytes([content[9] ^ 1]) + content[10:],
    }
    path.write_bytes(damaged[damage])
    if damage == "remove":
        path.unlink()
    assert make(source, tmp_path / "P") == [3]
    assert contents(tmp_path / "P") == before


def test_leftovers_of_a_killed_run_go(source: LineSource, tmp_path: Path) -> None:
    make(source, tmp_path / "P")
    before = contents(tmp_path / "P")
    for name in ("part-00001.bin", "sources-00000.json", "part-00005.json"):
        (tmp_path / "P" / f"{name}.0123abcd.tmp").write_bytes(b"x")
    make(source, tmp_path / "P", Shard(0, 2))
    assert (tmp_path / "P" / "part-00005.json.0123abcd.tmp").exists()  # another shard may be writing it
    make(source, tmp_path / "P", Shard(1, 2))
    assert contents(tmp_path / "P") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 31}, "seq_length was 30, is 31"),
        ({"merge": MergeOptions(packing="none")}, 'merge.packing was "best-fit", is "none"'),
        ({"options": {"epochs": 2}}, "options.epochs was null, is 2"),
        ({"tokenizer_sha256": "ab"}, 'tokenizer_sha256 was null, is "ab"'),
        ({"command": "other", "seq_length": 8}, 'command was "fake", is "other"; seq_length was 30, is 8'),
    ],
)
def test_other_options_are_refused_by_name(
    source: LineSource, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    make(source, tmp_path / "P")
    with pytest.raises(DataError, match="with other options or from other input: ") as caught:
        make(source, tmp_path / "P", **changes)
    assert message in str(caught.value)
    assert "Use the same ones to go on, or pass --overwrite to discard the parts" in str(caught.value)


def test_other_input_is_refused(source: LineSource, tmp_path: Path) -> None:
    make(source, tmp_path / "P")
    source.path.write_text("\n".join([*LINES[:-1], "u3 0 9"]))  # of another size
    with pytest.raises(DataError, match="from other input: in.txt had 154 bytes, has 152") as caught:
        make(source, tmp_path / "P")
    assert "stores." not in str(caught.value)
    source.path.write_text("\n".join(["v0 0 5", *LINES[1:]]))  # of the same size
    with pytest.raises(DataError, match="in.txt: changed since parts were made of it"):
        make(source, tmp_path / "P")


def test_one_shard_at_a_time(source: LineSource, tmp_path: Path) -> None:
    directory = tmp_path / "P"
    plan_agreement.agree_on_plan(directory, plan_of(source), {"": Input.of(source)})
    with contextlib.closing(sample_parts.open_locked(directory / "shard-1-of-2.lock", "other")):
        with pytest.raises(DataError, match="P, shard 1/2: another process is writing it now"):
            make(source, directory, Shard(1, 2))
        assert make(source, directory, Shard(0, 2)) == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "1.0/2", "²/3"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard is "):
        Shard.parse(text)


@given(st.integers(0, 200), st.integers(1, 50))
def test_shards_divide_the_work(total: int, count: int) -> None:
    owned = [list(Shard(index, count).numbers(total)) for index in range(count)]
    assert sum(owned, []) == list(range(total))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.9, 0.2), (-0.5, 1.5), (0.5, float("nan"))])
def test_shares_that_are_none(shares: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="--split is .*; it takes the shares of train and test"):
        MergeOptions(split=shares)


def test_very_many_files_are_recorded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_plan, "SINGLE_FILES", 4)
    monkeypatch.setattr(parts_plan, "FILES_TOGETHER", 3)
    store = StorePlan(parts=1, files=7, bytes=0, listing_sha256="")
    assert store.file_groups() == [range(0, 3), range(3, 6), range(6, 7)]
    assert replace(store, files=4).file_groups() == [range(n, n + 1) for n in range(4)]
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name * 3)
    together = hash_files([(name, tmp_path / name) for name in "abc"])
    (tmp_path / "listing").write_text("".join(f"{hash_file(tmp_path / name)}  {name}\n" for name in "abc"))
    assert (together.name, together.bytes) == ("a … c (3 files)", 9)
    assert together.hash == f"xxh128:{hash_file(tmp_path / 'listing')}"


def test_a_source_that_breaks_its_promises_is_a_bug(source: LineSource) -> None:
    block = source.make(0)
    plan = plan_of(source)
    for changes in (
        {"lengths": block.lengths[:-1]},
        {"groups": block.groups[:-1]},
        {"loss_mask": np.zeros(3, np.uint8)},
        {"tokens": block.tokens + VOCABULARY.size},
        {"tokens": block.tokens - 9},
    ):
        with pytest.raises(ValueError, match="do not agree|for every token|outside the vocabulary"):
            sample_parts._sample_content(replace(block, **changes), plan)
    with pytest.raises(ValueError, match="longer than 6 tokens"):
        sample_parts._sample_content(block, replace(plan, seq_length=6))


# --- the format


def whole_part(directory: Path) -> PartFiles:
    files = PartFiles(directory, 7)
    arrays = {
        "tokens": np.arange(5, dtype=np.uint16),
        "empty": np.zeros(0, np.int32),
        "ids": np.array([2**64 - 1], np.uint64),
    }
    write_part(files, "plan", arrays, {"notices": {"a": 1}})
    return files


def test_a_part_gives_back_what_was_written(tmp_path: Path) -> None:
    files = whole_part(tmp_path)
    part = open_part(files, "plan")
    assert part is not None and part.is_whole()
    assert {name: array.tolist() for name, array in part.arrays.items()} == {
        "tokens": [0, 1, 2, 3, 4], "empty": [], "ids": [2**64 - 1],
    }  # fmt: skip
    assert part.arrays["tokens"].dtype == np.uint16 and not part.arrays["tokens"].flags.writeable
    assert part.facts == {"notices": {"a": 1}}
    assert open_part(PartFiles(tmp_path, 8), "plan") is None
    with pytest.raises(DataError, match="part-00007.json: was made with other options"):
        open_part(files, "another plan")


def test_a_part_of_nothing(tmp_path: Path) -> None:
    files = PartFiles(tmp_path, 0)
    write_part(files, "plan", {"tokens": np.zeros(0, np.uint16)}, {})
    part = open_part(files, "plan")
    assert part is not None and part.is_whole() and len(part.arrays["tokens"]) == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_part_is_never_taken_for_a_whole_one(tmp_path: Path, data: st.DataObject) -> None:
    files = whole_part(tmp_path)
    path = data.draw(st.sampled_from([files.bin, files.json]))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(bytes(content))
    try:
        part = open_part(files, "plan")
    except DataError:
        return  # says that another plan made it
    if part is None or not part.is_whole():
        return
    assert part.facts == {"notices": {"a": 1}}
    assert {name: array.tolist() for name, array in part.arrays.items()} == {
        "tokens": [0, 1, 2, 3, 4], "empty": [], "ids": [2**64 - 1],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("**/*.tmp"))
