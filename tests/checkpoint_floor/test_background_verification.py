"""Weights are hashed while somebody reads them; everything else of a checkpoint before anybody reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from usdm_megatron.checkpoint.background_verification import verified_meanwhile
from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.checkpoint.resolve import NamedCheckpoint
from usdm_megatron.errors import CheckpointError

WEIGHTS_BYTES = 64 << 20
ALL_BYTES = 2 * WEIGHTS_BYTES + len("{}")


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


def names(problems: Iterable[str]) -> list[str]:
    return [Path(problem.split(" differs")[0]).name for problem in problems]


def test_a_block_that_reads_whole_weights_ends_when_all_is_hashed(directory: Path) -> None:
    seen: list[int] = []

    @contextmanager
    def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        assert (what, total_bytes) == ("checking", ALL_BYTES)
        yield seen.append

    with verified_meanwhile(NamedCheckpoint(directory), progress):
        pass
    assert sum(seen) == ALL_BYTES


@pytest.mark.parametrize("raised", [None, ValueError("no zip archive"), OSError(28, "No space left")])
def test_damage_is_named_whatever_the_block_raised(directory: Path, raised: Exception | None) -> None:
    for name in ("__0_1.distcp", "__0_0.distcp"):
        damage(directory / name)
    named = NamedCheckpoint(directory, "--ckpt-step 20", ("pick another one",))
    with pytest.raises(CheckpointError) as refused, verified_meanwhile(named):
        if raised is not None:
            raise raised
    *damaged, remedy = refused.value.problems
    assert names(damaged) == ["__0_0.distcp", "__0_1.distcp"]
    assert all(problem.endswith("(--ckpt-step 20)") for problem in damaged)
    assert remedy == "pick another one" and refused.value.__cause__ is raised


def test_over_whole_weights_the_block_s_own_error_counts(directory: Path) -> None:
    with pytest.raises(OSError, match="No space left"), verified_meanwhile(NamedCheckpoint(directory)):
        raise OSError(28, "No space left")


def test_facts_are_verified_without_the_weights(directory: Path) -> None:
    damage(directory / "__0_1.distcp")
    NamedCheckpoint(directory).verify_facts()
    damage(directory / "hf_config.json")
    with pytest.raises(CheckpointError) as refused:
        NamedCheckpoint(directory).verify_facts()
    assert names(refused.value.problems) == ["__0_1.distcp", "hf_config.json"]


@pytest.mark.parametrize("name", ["__0_1.distcp", "integrity.json"])
def test_weights_that_are_missing_are_found_with_the_facts(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        NamedCheckpoint(directory).verify_facts()


def test_ctrl_c_does_not_wait_for_the_rest(directory: Path) -> None:
    seen, begun, pressed = [], threading.Event(), threading.Event()

    @contextmanager
    def progress(_what: str, _total_bytes: int) -> Iterator[Callable[[int], None]]:
        def on_bytes(count: int) -> None:
            seen.append(count)
            begun.set()
            assert pressed.wait(60)

        yield on_bytes

    with pytest.raises(KeyboardInterrupt), verified_meanwhile(NamedCheckpoint(directory), progress):
        assert begun.wait(60)
        threading.Timer(0.2, pressed.set).start()  # the block is being left by then
        raise KeyboardInterrupt
    assert 0 < sum(seen) <= ALL_BYTES // 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("verification")]


def test_the_block_can_hear_of_damage_before_it_is_done(directory: Path) -> None:
    damage(directory / "__0_0.distcp")
    with (
        pytest.raises(CheckpointError, match="__0_0.distcp differs"),
        verified_meanwhile(NamedCheckpoint(directory)) as stop_if_damaged,
    ):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            stop_if_damaged()
            time.sleep(0.001)
        pytest.fail("it was never told")
