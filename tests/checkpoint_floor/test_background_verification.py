"""Weights are hashed while somebody reads them; everything else of a checkpoint before anybody reads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from usdm_megatron.checkpoint.background_verification import BackgroundVerification
from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.checkpoint.resolve import NamedCheckpoint
from usdm_megatron.errors import CheckpointError

WEIGHTS_BYTES = 64 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "hf_config.json").write_text("{}")
    for name in ("__0_0.distcp", "__0_1.distcp"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(WEIGHTS_BYTES)
    write_integrity(tmp_path)
    return tmp_path


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")


def problems_of(refused: pytest.ExceptionInfo[CheckpointError]) -> list[str]:
    return [Path(problem.split(" differs")[0]).name for problem in refused.value.problems]


def test_whole_weights_are_said_to_be_whole(directory: Path) -> None:
    with BackgroundVerification(NamedCheckpoint(directory)) as verification:
        assert verification.path == directory
        verification.require_whole()
        verification.require_whole()  # an export asks after an error, too


def test_damaged_weights_are_named_with_the_flag_and_the_remedy(directory: Path) -> None:
    damage(directory / "__0_1.distcp")
    damage(directory / "__0_0.distcp")
    named = NamedCheckpoint(directory, "--ckpt-step 20", ("pick another one",))
    with BackgroundVerification(named) as verification, pytest.raises(CheckpointError) as refused:
        verification.require_whole()
    *damaged, remedy = refused.value.problems
    assert [Path(problem.split(" differs")[0]).name for problem in damaged] == [
        "__0_0.distcp",
        "__0_1.distcp",
    ]
    assert all(problem.endswith("(--ckpt-step 20)") for problem in damaged)
    assert remedy == "pick another one"


def test_other_files_are_verified_before_anybody_reads_and_then_all_are_named(directory: Path) -> None:
    damage(directory / "hf_config.json")
    damage(directory / "__0_1.distcp")
    with pytest.raises(CheckpointError) as refused:
        BackgroundVerification(NamedCheckpoint(directory))
    assert problems_of(refused) == ["__0_1.distcp", "hf_config.json"]


@pytest.mark.parametrize("name", ["__0_1.distcp", "integrity.json"])
def test_what_is_missing_is_found_before_anybody_reads(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        BackgroundVerification(NamedCheckpoint(directory))


def test_who_leaves_does_not_wait_for_the_rest(directory: Path) -> None:
    """As after Ctrl-C: 128 MiB are not hashed to the end."""
    seen, begun, left = [], threading.Event(), threading.Event()

    @contextmanager
    def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        assert (what, total_bytes) == ("checking", 2 * WEIGHTS_BYTES + len("{}"))

        def on_bytes(count: int) -> None:
            seen.append(count)
            begun.set()
            assert left.wait(60)

        yield on_bytes

    verification = BackgroundVerification(NamedCheckpoint(directory), progress)
    with pytest.raises(KeyboardInterrupt), verification:
        assert begun.wait(60)
        threading.Timer(0.2, left.set).start()  # the block is being left by then
        raise KeyboardInterrupt
    assert 0 < sum(seen) <= WEIGHTS_BYTES // 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verification")]
