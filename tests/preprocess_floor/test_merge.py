"""Parts → stores: splits, duplicates, rows, masks and reports against plain Python."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.preprocess_floor.line_source import VOCABULARY, LineSource, sample_tokens
from usdm_megatron.data.token_store import StorePaths, TokenStore
from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.preprocess import merge, merged_samples
from usdm_megatron.preprocess.merge import MergeResult, merge_parts
from usdm_megatron.preprocess.merged_samples import first_of_each, in_test_split
from usdm_megatron.preprocess.parts_plan import IdRule, MergeOptions, Shard
from usdm_megatron.preprocess.stores import SampleOptions, StoreOptions, WorkOptions, write_samples

CAPACITY = 30
LINES = [f"u{number} {epoch} {6 + (7 * number + epoch) % 12}" for number in range(40) for epoch in range(3)]


def write(
    tmp_path: Path,
    lines: list[str] = LINES,
    name: str = "P",
    merge_options: MergeOptions = MergeOptions(),  # noqa: B008
    id_rule: IdRule = "once",
    with_mask: bool = False,
    **work: object,
) -> MergeResult | None:
    path = tmp_path / "in.txt"
    if not path.exists():
        path.write_text("\n".join(lines))
    return write_samples(
        "fake",
        {"": LineSource(path, lines_per_part=7, with_mask=with_mask)},
        str(tmp_path / name),
        StoreOptions(CAPACITY, VOCABULARY),
        SampleOptions(merge_options, {"epochs": 3}, id_rule=id_rule, input_holds_ids=False),
        WorkOptions(**work),
    )


def rows_of(prefix: Path) -> list[list[tuple[int, ...]]]:
    """Samples of every row."""
    store = TokenStore.open(prefix)
    store.verify()
    rows = [store.row(number) for number in range(store.rows)]
    return [
        [tuple(one.tolist()) for one in np.split(row.tokens, np.cumsum(row.sample_lengths)[:-1])]
        for row in rows
    ]


def expected(lines: list[str] = LINES) -> dict[tuple[int, ...], str]:
    """The utterance of every sample; the samples of the test lines all differ."""
    return {
        tuple(sample_tokens(name, int(epoch), int(length))): name
        for name, epoch, length in (line.split() for line in lines if not line.endswith("bad"))
    }


def test_every_sample_once_and_no_utterance_twice_in_a_row(tmp_path: Path) -> None:
    result = write(tmp_path)
    assert result is not None
    names = expected()
    assert len(names) == len(LINES)
    rows = rows_of(tmp_path / "P")
    assert Counter(sample for row in rows for sample in row) == Counter(names.keys())
    for row in rows:
        assert sum(map(len, row)) <= CAPACITY
        assert len({names[sample] for sample in row}) == len(row)
    summary = result.summaries[str(tmp_path / "P")]
    plan = summary.options["plan"]
    assert plan["stores"] == [""] and len(plan["id"]) == 64
    assert summary.options == {
        "plan": plan, "command": "fake", "seq_length": CAPACITY, "epochs": 3,
        "packing": "best-fit", "seed": 42, "split": None, "strict": False,
    }  # fmt: skip
    assert [(source.name, source.bytes) for source in summary.sources] == [
        ("in.txt", (tmp_path / "in.txt").stat().st_size)
    ]
    assert summary.notices == {"odd_lengths": sum(len(sample) % 2 for sample in names)}
    assert summary.fill > 0.9
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.txt", "P.bin", "P.idx", "P.json", "P_report.json",
    }  # fmt: skip


@pytest.mark.parametrize("packing", ["best-fit", "next-fit", "none"])
def test_the_way_of_packing_is_kept(tmp_path: Path, packing: str) -> None:
    write(tmp_path, merge_options=MergeOptions(packing=packing))
    rows = rows_of(tmp_path / "P")
    assert sorted(sample for row in rows for sample in row) == sorted(expected())
    assert (len(rows) == len(LINES)) == (packing == "none")
    other = replace(MergeOptions(packing=packing), seed=43)
    write(tmp_path, name="Q", merge_options=other)
    assert rows_of(tmp_path / "Q") != rows


@pytest.mark.parametrize(("share", "tested"), [(0.1, 4), (0.5, 20), (0.0001, 1), (0.9999, 39), (0.11, 4)])
def test_the_split_is_exact_and_by_utterance(tmp_path: Path, share: float, tested: int) -> None:
    result = write(tmp_path, merge_options=MergeOptions(split=(1 - share, share)))
    assert result is not None
    assert list(result.summaries) == [str(tmp_path / "P_train"), str(tmp_path / "P_test")]
    names = expected()
    train, test = (
        [names[sample] for row in rows_of(tmp_path / f"P_{split}") for sample in row]
        for split in ("train", "test")
    )
    assert len(set(test)) == tested and not set(train) & set(test)
    assert Counter(train + test) == Counter({f"u{number}": 3 for number in range(40)})


def test_a_split_depends_on_the_set_of_utterances_alone() -> None:
    rng = np.random.default_rng(0)
    utterances = rng.integers(0, 2**64, 1000, dtype=np.uint64).repeat(3)
    chosen = in_test_split(utterances, 0.1, 5)
    shuffled = rng.permutation(3000)
    assert np.array_equal(in_test_split(utterances[shuffled], 0.1, 5), chosen[shuffled])
    assert chosen.sum() == 300
    others = [in_test_split(utterances, 0.1, seed) for seed in range(6, 16)]
    assert 0.05 < np.mean([np.mean(other[chosen]) for other in others]) < 0.15  # seeds are independent


def test_a_split_of_one_utterance(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--split: the input has 1 utterances, the least is 2"):
        write(tmp_path, ["u0 0 5", "u0 1 5"], merge_options=MergeOptions(split=(0.9, 0.1)))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=30))
def test_first_of_each(pairs: list[tuple[int, int]]) -> None:
    utterances = np.array([pair[0] for pair in pairs], dtype=np.uint64)
    groups = np.array([pair[1] for pair in pairs], dtype=np.int32)
    assert first_of_each(utterances, groups).tolist() == [
        pair not in pairs[:at] for at, pair in enumerate(pairs)
    ]


def test_a_second_utterance_of_a_name_is_rejected(tmp_path: Path) -> None:
    lines = [*LINES, "u3 0 9", "u3 1 9", "u0 0 3", "u3 1 5", "u7 bad"]
    result = write(tmp_path, lines)
    assert result is not None
    assert result.rejected == {"bad": 1, "duplicate_id": 2}  # an utterance counts once, not once an epoch
    assert sorted(sample for row in rows_of(tmp_path / "P") for sample in row) == sorted(expected())
    report = json.loads((tmp_path / "P_report.json").read_text())
    assert report["rejected"] == {"total": 3, "by_reason": {"bad": 1, "duplicate_id": 2}}
    assert report["stores"][""]["samples"] == len(LINES)
    assert report["listed"][0] == {"where": "u7", "reason": "bad", "detail": "says so"}
    assert [one["where"] for one in report["listed"][1:]] == ["u3", "u0"]
    assert report["listed"][1]["detail"].startswith("the id comes again")


def test_an_id_that_was_rejected_is_taken_all_the_same(tmp_path: Path) -> None:
    lines = ["a 0 5", "q bad", "q 0 6", "q bad", "a bad", "r 0 7"]
    result = write(tmp_path, lines)
    assert result is not None and result.rejected == {"bad": 3, "duplicate_id": 1}
    assert sorted(sample for row in rows_of(tmp_path / "P") for sample in row) == sorted(
        tuple(sample_tokens(name, 0, length)) for name, length in (("a", 5), ("r", 7))
    )


def test_all_samples_of_a_dialog_stay_and_a_neighbour_of_its_id_goes(tmp_path: Path) -> None:
    lines = ["a 0 5+6", "a 0 7", "b 0 5", "a 0 8+9", "c 0 5", "b 0 6", "b 0 5"]
    result = write(tmp_path, lines)
    assert result is not None and result.rejected == {"duplicate_id": 4}
    assert sorted(sample for row in rows_of(tmp_path / "P") for sample in row) == sorted(
        tuple(sample_tokens(name, 0, length)) for name, length in (("a", 5), ("a", 6), ("b", 5), ("c", 5))
    )
    result = write(tmp_path, lines, name="Q", id_rule="any")
    assert result is not None and result.rejected == {}


def test_strict_names_what_would_be_rejected(tmp_path: Path) -> None:
    strict = MergeOptions(strict=True)
    with pytest.raises(DataError) as caught:
        write(tmp_path, [*LINES, "u3 0 9"], merge_options=strict)
    assert caught.value.problems[0].startswith("u3: rejected, duplicate_id (the id comes again")
    assert caught.value.problems[-1] == "--strict allows no rejection: mend the input, or leave the flag out"
    (tmp_path / "in.txt").write_text("\n".join([*LINES, *(f"v{number} bad" for number in range(30))]))
    with pytest.raises(DataError) as caught:
        write(tmp_path, name="Q", merge_options=strict)
    assert caught.value.problems[0] == "v0: rejected, bad (says so)"
    assert not list(tmp_path.glob("Q.[bij]*"))


def test_lists_are_bounded_and_counts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_samples, "LISTED_REJECTIONS", 5)
    result = write(tmp_path, [*LINES, *(f"v{number} bad" for number in range(30)), "u1 0 4"])
    assert result is not None and result.rejected == {"bad": 30, "duplicate_id": 1}
    assert len(json.loads((tmp_path / "P_report.json").read_text())["listed"]) == 5
    assert json.loads((tmp_path / "P_report.json").read_text())["not_listed"] == 26


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        write(tmp_path, ["u bad", "v bad"])
    assert caught.value.problems == (
        "in.txt: gives no sample, and an empty store cannot be trained on; mend what was rejected",
        "u: rejected, bad (says so)", "v: rejected, bad (says so)",
    )  # fmt: skip
    assert not list(tmp_path.glob("P.[bij]*"))


def test_small_blocks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, with_mask=True)
    monkeypatch.setattr(merged_samples, "BLOCK_TOKENS", 70)
    write(tmp_path, name="Q", with_mask=True)
    for suffix in (".bin", ".idx", ".json", "_loss_mask.bin", "_loss_mask.idx", "_loss_mask.targets"):
        assert (tmp_path / f"P{suffix}").read_bytes() == (tmp_path / f"Q{suffix}").read_bytes()


def test_the_mask_follows_its_tokens(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write(tmp_path, with_mask=True, merge_options=MergeOptions(split=(0.8, 0.2)))
    for split in ("train", "test"):
        store = TokenStore.open(tmp_path / f"P_{split}")
        tokens, mask = IndexedDataset(store.prefix), IndexedDataset(f"{store.prefix}_loss_mask")
        assert mask.index.dtype == np.uint8 and len(mask) == len(tokens) == store.summary.samples
        assert np.array_equal(mask.document_indices, tokens.document_indices)
        for index in range(len(tokens)):
            wanted = np.array(tokens[index]) % 2
            wanted[0] = 0  # bos is odd, but nothing comes before it
            assert np.array_equal(mask[index], wanted)
        counts = store.row_targets()
        assert counts is not None
        assert counts.tolist() == [int(store.row(row).loss_mask.sum()) for row in range(store.rows)]
        assert store.summary.loss_mask is not None and store.summary.loss_mask.targets == counts.sum()


def test_parts_without_a_mask_are_targets_everywhere(tmp_path: Path) -> None:
    write(tmp_path, with_mask=True, keep_parts=True)
    samples = merged_samples.MergedSamples.of(
        merge._whole_parts(
            merge.PartsPlan.read(tmp_path / "P.parts"), tmp_path / "P.parts", WorkOptions().executor
        )[""]
    )
    del samples.parts[0].arrays["loss_mask"]
    mask = samples._loss_masks()[0]
    lengths = samples.parts[0].arrays["lengths"]
    assert mask.sum() == len(mask) - len(lengths)
    assert not mask[np.cumsum(lengths) - lengths].any()


# --- finishing and going on


def test_parts_are_kept_on_request_and_merged_once(tmp_path: Path) -> None:
    first = write(tmp_path, keep_parts=True)
    assert (tmp_path / "P.parts" / "published").exists()
    before = {path: path.read_bytes() for path in StorePaths.of(tmp_path / "P")}
    assert write(tmp_path, keep_parts=True) == first  # done already: nothing to do, and no complaint
    assert merge_parts(str(tmp_path / "P"), WorkOptions().executor) == first
    assert not (tmp_path / "P.parts").exists()
    assert {path: path.read_bytes() for path in StorePaths.of(tmp_path / "P")} == before
    with pytest.raises(DataError, match="P exists already; pass --overwrite"):
        write(tmp_path)
    assert not (tmp_path / "P.parts").exists()  # said before any work


@pytest.mark.parametrize("split", [None, (0.8, 0.2)])
def test_finished_work_is_done_already(tmp_path: Path, split: tuple[float, float] | None) -> None:
    executor = WorkOptions().executor
    options = MergeOptions(split=split)
    for index in range(2):
        write(tmp_path, merge_options=options, shard=Shard(index, 2))
    first = merge_parts(str(tmp_path / "P"), executor)
    left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    again = merge_parts(str(tmp_path / "P"), executor)
    assert again.was_done and not first.was_done and again.summaries == first.summaries
    assert write(tmp_path, merge_options=options, shard=Shard(1, 2)) == again
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == left
    with pytest.raises(DataError, match="exists already"):  # another plan
        write(tmp_path, merge_options=replace(options, seed=1), shard=Shard(1, 2))
    StorePaths.of(list(first.summaries)[-1]).json.unlink()  # one of its stores is gone
    with pytest.raises(DataError, match="no parts here"):
        merge_parts(str(tmp_path / "P"), executor)


def test_another_store_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    write(tmp_path, keep_parts=True)
    write(tmp_path, name="Q", merge_options=MergeOptions(seed=1))
    for path, other in zip(StorePaths.of(tmp_path / "P"), StorePaths.of(tmp_path / "Q"), strict=True):
        path.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path)
    for path in (*StorePaths.of(tmp_path / "P"), tmp_path / "P_report.json"):
        path.unlink()
    assert write(tmp_path) is not None
    assert TokenStore.open(tmp_path / "P").identity != TokenStore.open(tmp_path / "Q").identity


def test_missing_and_damaged_parts_are_named(tmp_path: Path) -> None:
    executor = WorkOptions().executor
    with pytest.raises(DataError, match=r"P.parts: no parts here; make them first, with --shard i/n"):
        merge_parts(str(tmp_path / "P"), executor)
    assert write(tmp_path, shard=Shard(0, 3)) is None
    with pytest.raises(
        DataError, match=r"part-00006.bin, .*part-00015.bin and 3 more missing; run the command"
    ):
        merge_parts(str(tmp_path / "P"), executor)
    write(tmp_path, shard=Shard(1, 3))
    write(tmp_path, shard=Shard(2, 3))
    (tmp_path / "P.parts" / "sources-00000.json").unlink()
    with pytest.raises(DataError, match=r"P.parts: sources-00000.json missing"):
        merge_parts(str(tmp_path / "P"), executor)
    write(tmp_path, shard=Shard(2, 3))
    path = tmp_path / "P.parts" / "part-00004.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"P.parts: part-00004.bin damaged; run the command"):
        merge_parts(str(tmp_path / "P"), executor)
    assert not list(tmp_path.glob("P.[bij]*"))
    write(tmp_path, shard=Shard(0, 1))
    merge_parts(str(tmp_path / "P"), executor)
    assert sorted(sample for row in rows_of(tmp_path / "P") for sample in row) == sorted(expected())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format_version": 9}', b'{"format_version": 1}'])
def test_a_plan_that_is_none(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, shard=Shard(0, 1))
    (tmp_path / "P.parts" / "plan.json").write_bytes(content)
    with pytest.raises(
        DataError, match=r"plan.json: cannot be read .*; remove .*P.parts and make the parts again"
    ):
        merge_parts(str(tmp_path / "P"), WorkOptions().executor)


def test_own_splits_and_a_split_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("u 0 5")
    source = LineSource(tmp_path / "in.txt")
    with pytest.raises(ConfigError, match=r"--split: the input has splits of its own \(train, test\)"):
        write_samples(
            "fake",
            {"train": source, "test": source},
            str(tmp_path / "P"),
            StoreOptions(CAPACITY, VOCABULARY),
            SampleOptions(MergeOptions(split=(0.9, 0.1))),
        )


def test_several_sources_give_several_stores(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LINES[:30]))
    (tmp_path / "b.txt").write_text("\n".join(LINES[30:40]))
    result = write_samples(
        "fake",
        {"train": LineSource(tmp_path / "a.txt"), "test": LineSource(tmp_path / "b.txt")},
        str(tmp_path / "P"),
        StoreOptions(CAPACITY, VOCABULARY),
        SampleOptions(id_rule="once"),
    )
    assert result is not None
    for split, name, lines in (("train", "a.txt", LINES[:30]), ("test", "b.txt", LINES[30:40])):
        rows = rows_of(tmp_path / f"P_{split}")
        assert sorted(sample for row in rows for sample in row) == sorted(expected(lines))
        assert [source.name for source in result.summaries[str(tmp_path / f"P_{split}")].sources] == [name]


def test_too_little_space_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usdm_megatron.data import file_writing

    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(file_writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"the store takes at least 0.00 GiB, 0.00 GiB are free; free space"):
        write(tmp_path)
    assert not list(tmp_path.glob("P.[bij]*"))


@pytest.mark.parametrize("stage", ["P.parts/part", "P.parts/plan", "P_report"])
def test_a_full_disk_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Whatever file it hits; the same call goes on once there is space."""
    from usdm_megatron.data import file_writing

    real = file_writing.os.replace

    def full(source: Path, target: Path) -> None:
        if stage in str(target):
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(file_writing.os, "replace", full)
        with pytest.raises(DataError, match=r"cannot write \(No space left on device\); free space"):
            write(tmp_path)
    assert not list(tmp_path.glob("**/*.tmp"))
    assert write(tmp_path) is not None
    assert sorted(sample for row in rows_of(tmp_path / "P") for sample in row) == sorted(expected())
