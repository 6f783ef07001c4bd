"""A file that is not what was written is named; nothing is believed without its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.checkpoint.integrity import files_below, verify_integrity, write_integrity
from usdm_megatron.file_reading import file_sha256

CONTENTS = {
    "common.pt": b"common",
    ".metadata": b"where",
    "__0_0.distcp": bytes(range(256)),
    "tokenizer/a.json": b"{}",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make(tmp_path / "checkpoint")


def make(directory: Path) -> Path:
    for name, content in CONTENTS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_integrity(directory)
    return directory


def test_the_record_is_the_sha256_of_every_file(directory: Path) -> None:
    record = json.loads((directory / "integrity.json").read_text())
    assert record == {
        "algorithm": "sha256",
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()},
    }
    assert files_below(directory) == sorted(CONTENTS)
    assert verify_integrity(directory) == []


def test_hashes_that_ranks_bring_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    write_integrity(tmp_path, {"a": "0" * 64})
    assert [problem.split()[0] for problem in verify_integrity(tmp_path)] == [str(tmp_path / "a")]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(CONTENTS)), data=st.data())
def test_any_flipped_byte_is_found_and_its_file_named(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    directory = make(tmp_path_factory.mktemp("flip") / "checkpoint")
    content = bytearray((directory / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (directory / name).write_bytes(content)
    (problem,) = verify_integrity(directory)
    assert str(directory / name) in problem and "differs" in problem


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_in_the_record_itself_is_never_taken_for_a_whole_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = make(tmp_path_factory.mktemp("flip") / "checkpoint")
    path = directory / "integrity.json"
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        harmless = json.loads(content) == json.loads(json.dumps(_record(directory)))  # whitespace
    except ValueError:
        harmless = False
    assert (verify_integrity(directory) == []) is harmless


def _record(directory: Path) -> dict:
    return {"algorithm": "sha256", "files": {name: file_sha256(directory / name) for name in CONTENTS}}


def test_truncated_deleted_and_foreign_files(directory: Path) -> None:
    (directory / "__0_0.distcp").write_bytes(b"short")
    (directory / "common.pt").unlink()
    (directory / "notes.txt").write_text("what nothing reads does no harm")
    problems = verify_integrity(directory)
    assert len(problems) == 2
    assert problems[0] == f"{directory / 'common.pt'} is missing"
    assert problems[1].startswith(f"{directory / '__0_0.distcp'} differs")


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"algorithm": "md5", "files": {"a": "b"}}',
        '{"algorithm": "sha256", "files": {}}',
    ],
)
def test_a_record_that_says_nothing_is_a_problem(directory: Path, record: str) -> None:
    (directory / "integrity.json").write_text(record)
    (problem,) = verify_integrity(directory)
    assert "integrity.json" in problem


def test_a_record_cannot_point_outside(directory: Path) -> None:
    (directory.parent / "secret").write_text("x")
    record = {"algorithm": "sha256", "files": {"../secret": "0" * 64, "/etc/hostname": "0" * 64}}
    (directory / "integrity.json").write_text(json.dumps(record))
    assert all("outside the checkpoint" in problem for problem in verify_integrity(directory))


def test_progress_is_shown_in_bytes(directory: Path) -> None:
    seen: list[int] = []
    asked: list[tuple[str, int]] = []

    @contextmanager
    def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        asked.append((what, total_bytes))
        yield seen.append

    assert verify_integrity(directory, progress) == []
    total_bytes = sum(map(len, CONTENTS.values()))
    assert asked == [("checking", total_bytes)] and sum(seen) == total_bytes


def test_without_a_record_the_save_was_not_finished(directory: Path) -> None:
    (directory / "integrity.json").unlink()
    (problem,) = verify_integrity(directory)
    assert "not finished" in problem
