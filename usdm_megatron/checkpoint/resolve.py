"""Which checkpoints a directory holds, which one is meant, and whether it can be believed.

root/latest_checkpointed_iteration.txt   `N` or `release`, written last: it names the newest
root/best_checkpointed_iteration.txt     `N`
root/iter_0000020/                       a step of a run
root/release/                            a converted model
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
class NamedCheckpoint:
    """The one checkpoint that a directory and a step name, not verified yet."""

    path: Path
    flag: str = ""  # that chose it: said with every problem
    remedy: tuple[str, ...] = ()  # what else could be taken

    def verify(self, progress: ByteProgress = no_progress) -> None:
        """Read every byte; raises `CheckpointError` naming each missing or damaged file."""
        if problems := verify_integrity(self.path, progress):
            raise self.damaged(problems)

    def verify_facts(self, progress: ByteProgress = no_progress) -> None:
        """Verify all files but the weights, which are only looked for: that takes no time.

        Raises `CheckpointError` naming each missing or damaged file, then of the weights, too.
        """
        if problems := verify_integrity(self.path, weights=False):
            raise self.damaged(verify_integrity(self.path, progress) or problems)

    def damaged(self, problems: Sequence[str]) -> CheckpointError:
        """The error that says what `verify_integrity` found."""
        chosen = f" ({self.flag})" if self.flag else ""
        return CheckpointError(*(f"{problem}{chosen}" for problem in problems), *self.remedy)


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


def name_checkpoint(root: Path | str, ckpt_step: int | Literal["best"] | None = None) -> NamedCheckpoint:
    """The checkpoint that `root` (a run, a converted model, or one checkpoint directory) means, unverified.

    Without `ckpt_step` it is the one that the tracker names. Raises `CheckpointError` when there is none.
    """
    root = _directory(root)
    if ckpt_step is not None:
        return NamedCheckpoint(_chosen(root, ckpt_step), f"--ckpt-step {ckpt_step}")
    if _is_checkpoint(root):
        return NamedCheckpoint(root)
    try:
        path = _candidates(root, read_tracker(root))[0]
    except CheckpointError as error:
        raise CheckpointError(*error.problems, *_remedy(root, root / TRACKER_FILE)) from error
    return NamedCheckpoint(path, remedy=_remedy(root, path))


def resolve_checkpoint(
    root: Path | str,
    ckpt_step: int | Literal["best"] | None = None,
    *,
    fallback: bool,
    progress: ByteProgress = no_progress,
) -> ResolvedCheckpoint:
    """The checkpoint that `root` and `ckpt_step` mean (as `name_checkpoint`), verified.

    When the hashes of the newest do not match, `fallback=True` (resume) goes back to the newest older
    one that is whole and records what was skipped; `fallback=False` (export, evaluation) never does. A
    `ckpt_step` is taken or refused.

    Reads every byte, which `progress` shows: in a multi-rank program call it on rank 0 (`on_rank_zero`).
    Raises `CheckpointError` naming each missing or damaged file.
    """
    root = _directory(root)
    if not fallback or ckpt_step is not None or _is_checkpoint(root):
        named = name_checkpoint(root, ckpt_step)
        named.verify(progress)
        return ResolvedCheckpoint(named.path, step_of(named.path))
    skipped: list[SkippedCheckpoint] = []
    try:
        newest = read_tracker(root)
    except CheckpointError as error:  # the largest number has to do; it is said
        newest = None
        skipped.append(SkippedCheckpoint(root / TRACKER_FILE, error.problems))
    for path in _candidates(root, newest):
        problems = verify_integrity(path, progress)
        if not problems:
            return ResolvedCheckpoint(path, step_of(path), tuple(skipped))
        skipped.append(SkippedCheckpoint(path, tuple(problems)))
    remedy = _remedy(root, skipped[0].path)
    raise CheckpointError(*(problem for entry in skipped for problem in entry.problems), *remedy)


def _candidates(root: Path, newest: CheckpointName | None) -> list[Path]:
    """Newest first. The tracker, which says `newest`, decides what is newest, not the largest number.

    After a step back (`--ckpt-step 20` in a run that had reached 40) the larger number is the
    abandoned one. Without a tracker (it was lost) the largest number has to do. Raises `CheckpointError`
    when there are none.
    """
    steps = list_steps(root)
    if newest == RELEASE:
        return [root / RELEASE]
    if newest is None:
        found = [root / directory_name(step) for step in reversed(steps)]
        found = found or ([root / RELEASE] if (root / RELEASE).is_dir() else [])
        if not found:
            raise CheckpointError(f"{root} holds no checkpoint (no {TRACKER_FILE}, iter_* or release/)")
        return found
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


def _remedy(root: Path, newest: Path) -> tuple[str, ...]:
    others = [str(step) for step in list_steps(root) if step != step_of(newest)]
    return (f"pick another checkpoint of {root} with --ckpt-step ({', '.join(others)})",) if others else ()


def _directory(root: Path | str) -> Path:
    if not Path(root).is_dir():
        raise CheckpointError(f"{root} is not a directory")
    return Path(root)


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
