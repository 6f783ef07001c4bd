"""The commit protocol on one rank, and which checkpoint is taken afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from usdm_megatron.checkpoint import commit as commit_module
from usdm_megatron.checkpoint.commit import (
    commit_checkpoint,
    remove_stale_temporaries,
    rotate,
    write_best,
    write_tracker,
)
from usdm_megatron.checkpoint.integrity import verify_integrity
from usdm_megatron.checkpoint.resolve import (
    has_checkpoint,
    list_steps,
    read_best,
    read_tracker,
    resolve_checkpoint,
)
from usdm_megatron.errors import CheckpointError


def write(content: str = "weights") -> Callable[[Path], None]:
    def into(directory: Path) -> None:
        (directory / "__0_0.distcp").write_text(content)
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "tokenizer.json").write_text("{}")

    return into


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at 20, 40 and 60."""
    for step in (20, 40, 60):
        commit_checkpoint(tmp_path, step, write(f"weights of {step}"))
    return tmp_path


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_commit_leaves_a_verified_checkpoint_and_the_tracker_and_nothing_else(tmp_path: Path) -> None:
    path = commit_checkpoint(tmp_path / "run", 20, write())
    assert path == tmp_path / "run" / "iter_0000020"
    assert verify_integrity(path) == []
    assert names(tmp_path / "run") == {"iter_0000020", "latest_checkpointed_iteration.txt"}
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "20"
    commit_checkpoint(tmp_path / "converted", "release", write())
    assert (tmp_path / "converted" / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    assert (
        resolve_checkpoint(tmp_path / "converted", fallback=False).path == tmp_path / "converted" / "release"
    )


@pytest.mark.parametrize(
    "stage", ["write", "_sync_own_files", "write_integrity", "sync_tree", "publish_directory"]
)
def test_a_failure_at_any_stage_leaves_the_last_good_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if stage != "write":
        monkeypatch.setattr(commit_module, stage, fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        commit_checkpoint(run, 80, fail if stage == "write" else write())
    assert names(run) == {"iter_0000020", "iter_0000040", "iter_0000060", "latest_checkpointed_iteration.txt"}
    assert resolve_checkpoint(run, fallback=True).step == 60


def test_a_failure_between_rename_and_tracker_resumes_from_the_tracker_and_can_save_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "write_tracker", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(CheckpointError, match="killed"):
            commit_checkpoint(run, 80, write("first"))
    assert resolve_checkpoint(run, fallback=True).step == 60
    commit_checkpoint(run, 80, write("second"), replace=True)
    assert (run / "iter_0000080" / "__0_0.distcp").read_text() == "second"
    assert resolve_checkpoint(run, fallback=True).step == 80


def test_an_existing_checkpoint_is_never_written_into(run: Path) -> None:
    with pytest.raises(CheckpointError, match="iter_0000040 exists already"):
        commit_checkpoint(run, 40, write("other"))
    assert (run / "iter_0000040" / "__0_0.distcp").read_text() == "weights of 40"
    commit_checkpoint(run, 40, write("other"), replace=True)
    assert (run / "iter_0000040" / "__0_0.distcp").read_text() == "other"
    assert not [name for name in names(run) if ".tmp-" in name]


def test_a_failed_replacement_keeps_the_old_one(run: Path) -> None:
    def fail(directory: Path) -> None:
        raise OSError("disk")

    with pytest.raises(CheckpointError):
        commit_checkpoint(run, 40, fail, replace=True)
    assert verify_integrity(run / "iter_0000040") == []


def test_stale_temporaries_are_removed_and_nothing_else(run: Path) -> None:
    stale = ["iter_0000080.tmp-" + "0a" * 16, "latest_checkpointed_iteration.txt.tmp-" + "ff" * 16]
    (run / stale[0]).mkdir()
    (run / stale[0] / "__0_0.distcp").write_text("half")
    (run / stale[1]).write_text("8")
    (run / "my.tmp-notes").write_text("a user's")
    assert remove_stale_temporaries(run) == stale
    assert "my.tmp-notes" in names(run)
    assert remove_stale_temporaries(run) == [] == remove_stale_temporaries(run / "nowhere")


def test_only_whole_names_count(run: Path) -> None:
    for name in (
        "iter_0000100-old",
        "old-iter_0000100",
        "iter_100",
        "iter_00000200",
        "iter_0000300.tmp-" + "0" * 32,
    ):
        (run / name).mkdir()
    (run / "iter_0000400").write_text("a file")
    (run / "backup" / "iter_0000500").mkdir(parents=True)
    assert list_steps(run) == [20, 40, 60]


def test_resume_goes_back_to_the_one_before_and_says_why(run: Path) -> None:
    (run / "iter_0000060" / "__0_0.distcp").write_text("weights of 6O")
    (run / "iter_0000040" / "tokenizer" / "tokenizer.json").unlink()
    resolved = resolve_checkpoint(run, fallback=True)
    assert (resolved.path, resolved.step) == (run / "iter_0000020", 20)
    assert [entry.path.name for entry in resolved.skipped] == ["iter_0000060", "iter_0000040"]
    assert "__0_0.distcp differs" in resolved.skipped[0].problems[0]
    assert "tokenizer.json is missing" in resolved.skipped[1].problems[0]


def test_export_never_falls_back_and_names_the_file_and_the_remedy(run: Path) -> None:
    (run / "iter_0000060" / "__0_0.distcp").write_text("weights of 6O")
    with pytest.raises(CheckpointError) as refused:
        resolve_checkpoint(run, fallback=False)
    assert "iter_0000060/__0_0.distcp differs" in str(refused.value)
    assert "--ckpt-step (20, 40)" in str(refused.value)
    assert resolve_checkpoint(run, 40, fallback=False).step == 40


def test_a_chosen_step_is_taken_or_refused_even_on_resume(run: Path) -> None:
    (run / "iter_0000040" / "__0_0.distcp").write_text("?")
    with pytest.raises(CheckpointError, match="iter_0000040/__0_0.distcp differs.*--ckpt-step 40"):
        resolve_checkpoint(run, 40, fallback=True)
    with pytest.raises(CheckpointError, match=r"iter_0000030 does not exist \(steps there: 20, 40, 60\)"):
        resolve_checkpoint(run, 30, fallback=True)
    with pytest.raises(CheckpointError, match="--keep-best"):
        resolve_checkpoint(run, "best", fallback=False)
    write_best(run, 20)
    assert read_best(run) == 20
    assert resolve_checkpoint(run, "best", fallback=False).step == 20


def test_after_a_step_back_the_tracker_counts_not_the_largest_number(run: Path) -> None:
    write_tracker(run, 20)
    commit_checkpoint(run, 30, write())
    assert resolve_checkpoint(run, fallback=True).step == 30
    (run / "iter_0000030" / "__0_0.distcp").write_text("?")
    assert resolve_checkpoint(run, fallback=True).step == 20


def test_a_lost_or_garbled_tracker_is_no_lost_run(run: Path) -> None:
    tracker = run / "latest_checkpointed_iteration.txt"
    tracker.write_text("6 0")
    with pytest.raises(CheckpointError, match="expected a step or `release`"):
        read_tracker(run)
    resolved = resolve_checkpoint(run, fallback=True)
    assert resolved.step == 60 and "says '6 0'" in resolved.skipped[0].problems[0]
    with pytest.raises(CheckpointError, match=r"says '6 0'(.|\n)*--ckpt-step \(20, 40, 60\)"):
        resolve_checkpoint(run, fallback=False)  # an export never guesses
    assert resolve_checkpoint(run, 20, fallback=False).step == 20
    tracker.unlink()
    assert resolve_checkpoint(run, fallback=True).step == 60
    assert has_checkpoint(run)


def test_a_tracker_that_names_a_missing_directory(run: Path) -> None:
    write_tracker(run, 100)
    resolved = resolve_checkpoint(run, fallback=True)
    assert resolved.step == 60 and "iter_0000100 is missing" in resolved.skipped[0].problems[0]
    with pytest.raises(CheckpointError, match="iter_0000100 is missing"):
        resolve_checkpoint(run, fallback=False)


def test_one_checkpoint_directory_can_be_named_itself(run: Path) -> None:
    resolved = resolve_checkpoint(run / "iter_0000040", fallback=True)
    assert (resolved.path, resolved.step) == (run / "iter_0000040", 40)


def test_nothing_there(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path) and not has_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(tmp_path, fallback=True)
    with pytest.raises(CheckpointError, match="is not a directory"):
        resolve_checkpoint(tmp_path / "nowhere", fallback=True)


def test_everything_damaged_names_every_file(run: Path) -> None:
    for step in (20, 40, 60):
        (run / f"iter_{step:07d}" / "integrity.json").unlink()
    with pytest.raises(CheckpointError) as refused:
        resolve_checkpoint(run, fallback=True)
    assert all(f"iter_{step:07d}/integrity.json is missing" in str(refused.value) for step in (20, 40, 60))


def test_rotation_keeps_the_newest_and_the_best(run: Path) -> None:
    commit_checkpoint(run, 80, write())
    write_best(run, 20)
    assert rotate(run, None) == []
    assert rotate(run, 2) == [40]
    assert list_steps(run) == [20, 60, 80]
    assert rotate(run, 1) == [60]
    assert list_steps(run) == [20, 80]
    with pytest.raises(CheckpointError, match="at least 1"):
        rotate(run, 0)


def test_rotation_leaves_abandoned_steps_and_converted_models_alone(run: Path) -> None:
    write_tracker(run, 40)
    assert rotate(run, 1) == [20]
    assert list_steps(run) == [40, 60]
    commit_checkpoint(run / "converted", "release", write())
    assert rotate(run / "converted", 1) == []
