"""Which checkpoints a directory holds, which one is meant, and whether it can be believed.

root/latest_checkpointed_iteration.txt   `N` or `release`, written last: it names the newest
root/best_checkpointed_iteration.txt     `N`
root/iter_0000020/                       a step of a run
root/release/                            a converted model
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from usdm_megatron.checkpoint.integrity import (
    INTEGRITY_FILE,
    ByteProgress,
    no_progress,
    verify_integrity,
)
from usdm_megatron.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
BEST_FILE = "best_checkpointed_iteration.txt"
RELEASE: Literal["release"] = "release"
CheckpointName = int | Literal["release"]  # a step, or a converted model

# The whole name: `iter_0000100-old` and `iter_0000100.tmp-…` are no checkpoints.
_STEP_DIRECTORY = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that was not taken, and why."""

    path: Path  # of the tracker, when that cannot be read
    problems: tuple[str, ...]


@dataclass(frozen=True)
class ResolvedCheckpoint:
    """The checkpoint to read: its hashes were verified."""

    path: Path
    step: int | None  # None: a converted model (`release`), or a directory named otherwise
    skipped: tuple[SkippedCheckpoint, ...] = ()  # newer ones that failed verification


def directory_name(name: CheckpointName) -> str:
    """`iter_0000020` or `release`."""
    return RELEASE if name == RELEASE else f"iter_{name:07d}"


def step_of(directory: Path) -> int | None:
    """The step that a directory's name says; None when it is no step of a run."""
    match = _STEP_DIRECTORY.fullmatch(directory.name)
    return int(match[1]) if match and directory_name(int(match[1])) == directory.name else None


def list_steps(root: Path) -> list[int]:
    """Steps of the checkpoint directories in `root`, ascending; nothing is read."""
    if not root.is_dir():
        return []
    steps = (step_of(path) for path in root.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def has_checkpoint(root: Path) -> bool:
    """Whether `root` holds a checkpoint at all, good or bad (or is one)."""
    return (
        _is_checkpoint(root)
        or (root / TRACKER_FILE).exists()
        or bool(list_steps(root))
        or (root / RELEASE).is_dir()
    )


def read_tracker(root: Path) -> CheckpointName | None:
    """What `latest_checkpointed_iteration.txt` says; None when there is none.

    Raises `CheckpointError` when it says neither a step nor `release`.
    """
    text = _read_text(root / TRACKER_FILE)
    return text if text is None or text == RELEASE else _parse_step(root / TRACKER_FILE, text)


def read_best(root: Path) -> int | None:
    """The step of the best checkpoint by evaluation loss; None when none is recorded."""
    text = _read_text(root / BEST_FILE)
    return None if text is None else _parse_step(root / BEST_FILE, text)


def resolve_checkpoint(
    root: Path | str,
    ckpt_step: int | Literal["best"] | None = None,
    *,
    fallback: bool,
    progress: ByteProgress = no_progress,
) -> ResolvedCheckpoint:
    """The checkpoint that `root` (a run, a converted model, or one checkpoint directory) means.

    Without `ckpt_step` it is the one that the tracker names. When its hashes do not match,
    `fallback=True` (resume) goes back to the newest older one that is whole and records what was
    skipped; `fallback=False` (export, evaluation) never does. A `ckpt_step` is taken or refused.

    Reads every byte, which `progress` shows: in a multi-rank program call it on rank 0 (`on_rank_zero`).
    Raises `CheckpointError` naming each missing or damaged file.
    """
    root = Path(root)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory")
    if ckpt_step is not None:
        return _verified(_chosen(root, ckpt_step), ckpt_step, progress)
    if _is_checkpoint(root):
        return _verified(root, None, progress)
    skipped: list[SkippedCheckpoint] = []
    try:
        newest = read_tracker(root)
    except CheckpointError as error:  # resume takes the largest number, and says so
        if not fallback:
            raise CheckpointError(*error.problems, *_remedy(root, root / TRACKER_FILE)) from error
        newest = None
        skipped.append(SkippedCheckpoint(root / TRACKER_FILE, error.problems))
    candidates = _candidates(root, newest)
    if not candidates:
        raise CheckpointError(f"{root} holds no checkpoint (no {TRACKER_FILE}, iter_* or release/)")
    for path in candidates if fallback else candidates[:1]:
        problems = verify_integrity(path, progress) if path.is_dir() else [f"{path} is missing"]
        if not problems:
            return ResolvedCheckpoint(path, step_of(path), tuple(skipped))
        skipped.append(SkippedCheckpoint(path, tuple(problems)))
    remedy = _remedy(root, skipped[0].path)
    raise CheckpointError(*(problem for entry in skipped for problem in entry.problems), *remedy)


def _candidates(root: Path, newest: CheckpointName | None) -> list[Path]:
    """Newest first. The tracker, which says `newest`, decides what is newest, not the largest number.

    After a step back (`--ckpt-step 20` in a run that had reached 40) the larger number is the
    abandoned one. Without a tracker (it was lost) the largest number has to do.
    """
    steps = list_steps(root)
    if newest == RELEASE:
        return [root / RELEASE]
    if newest is None:
        found = [root / directory_name(step) for step in reversed(steps)]
        return found or ([root / RELEASE] if (root / RELEASE).is_dir() else [])
    older = [step for step in steps if step < newest]
    return [root / directory_name(step) for step in (newest, *reversed(older))]


def _chosen(root: Path, ckpt_step: int | Literal["best"]) -> Path:
    step: int | None
    if ckpt_step == "best":
        step = read_best(root)
        if step is None:
            raise CheckpointError(
                f"--ckpt-step best: {root / BEST_FILE} does not exist; train with --keep-best"
            )
    else:
        step = ckpt_step
    path = root / directory_name(step)
    if not path.is_dir():
        there = ", ".join(map(str, list_steps(root))) or "none"
        raise CheckpointError(f"--ckpt-step {ckpt_step}: {path} does not exist (steps there: {there})")
    return path


def _verified(
    path: Path, ckpt_step: int | Literal["best"] | None, progress: ByteProgress
) -> ResolvedCheckpoint:
    if problems := verify_integrity(path, progress):
        chosen = "" if ckpt_step is None else f" (--ckpt-step {ckpt_step})"
        raise CheckpointError(*(f"{problem}{chosen}" for problem in problems))
    return ResolvedCheckpoint(path, step_of(path))


def _remedy(root: Path, newest: Path) -> list[str]:
    others = [str(step) for step in list_steps(root) if step != step_of(newest)]
    return [f"pick another checkpoint of {root} with --ckpt-step ({', '.join(others)})"] if others else []


def _is_checkpoint(directory: Path) -> bool:
    return (directory / INTEGRITY_FILE).is_file() or (directory / "metadata.json").is_file()


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse_step(path: Path, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CheckpointError(f"{path} says {text[:40]!r}; expected a step" + _or_release(path))
    return int(text)


def _or_release(path: Path) -> str:
    return " or `release`" if path.name == TRACKER_FILE else ""
