"""The commit protocol: a checkpoint is either whole under its final name, or not there.

    iter_N.tmp-<uuid>/ written by all ranks → fsync files and directories → integrity.json
    → all ranks agree → rename → fsync the parent → tracker by tmp + rename → rotation

Every stage is agreed on: what fails on one rank is raised on all (`on_every_rank`).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from usdm_megatron.checkpoint.integrity import file_hashes, files_below, write_integrity
from usdm_megatron.checkpoint.ranks import on_every_rank, on_rank_zero, rank_and_world_size
from usdm_megatron.checkpoint.resolve import (
    BEST_FILE,
    RELEASE,
    TRACKER_FILE,
    CheckpointName,
    directory_name,
    list_steps,
    read_best,
    read_tracker,
)
from usdm_megatron.errors import CheckpointError

_SUFFIX = r"\.tmp-[0-9a-f]{32}"  # of `temporary_path`
_TEMPORARY = re.compile(  # what a save of ours renames, and nothing of anybody else's
    rf"(?:iter_\d{{7,}}|{RELEASE}|{re.escape(TRACKER_FILE)}|{re.escape(BEST_FILE)}){_SUFFIX}"
)
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp")
# linux/fcntl.h, linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def commit_checkpoint(
    root: Path,
    name: CheckpointName,
    write: Callable[[Path], Mapping[str, str] | None],
    *,
    replace: bool = False,
) -> Path:
    """Have every rank `write` into a fresh directory and give it its final name; returns that.

    Collective over all ranks. `write(directory)` is called on each rank with the same directory;
    it may return the sha256 by name of files that it has hashed and synced itself. An existing
    checkpoint is never written into: it is refused, or with `replace` moved away in the moment the
    new one is whole. Raises `CheckpointError` on all ranks when any stage fails on any of them;
    nothing unfinished ever has the final name.
    """
    final = root / directory_name(name)
    temporary = on_rank_zero(f"creating {final}", lambda: _make_temporary(final, replace))
    try:
        # a stage of its own: `write` has collectives inside, which a rank that stops early would upset
        on_every_rank(f"writing {final}", lambda: _check_shared(temporary))
        own_hashes: dict[str, str] = {}
        on_every_rank(f"writing {final}", lambda: own_hashes.update(write(temporary) or {}))
        hashes = on_every_rank(f"syncing {final}", lambda: _sync_own_files(temporary, own_hashes))
        merged = {file: digest for of_rank in hashes for file, digest in of_rank.items()}
        on_rank_zero(f"committing {final}", lambda: _publish(root, name, temporary, merged))
    except BaseException:
        if rank_and_world_size()[0] == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def write_tracker(root: Path, name: CheckpointName) -> None:
    """Make `name` the newest checkpoint of `root`, atomically."""
    replace_text(root / TRACKER_FILE, f"{name}\n")


def write_best(root: Path, step: int) -> None:
    """Record the step of the best checkpoint, atomically."""
    replace_text(root / BEST_FILE, f"{step}\n")


def rotate(root: Path, save_total_limit: int | None) -> list[int]:
    """Remove old checkpoints beyond the newest `save_total_limit`; returns the removed steps.

    Never removes the newest, the best, a converted model, or steps beyond the tracker's (what
    a step back with `--ckpt-step` has abandoned is the user's to delete). Rank 0 only.
    """
    newest = read_tracker(root)
    if save_total_limit is None or newest is None or newest == RELEASE:
        return []
    if save_total_limit < 1:
        raise CheckpointError(f"--save-total-limit {save_total_limit} must be at least 1")
    steps = [step for step in list_steps(root) if step <= newest]
    kept = {*steps[-save_total_limit:], newest, read_best(root)}
    removed = [step for step in steps if step not in kept]
    for step in removed:
        remove_directory(root / directory_name(step))
    return removed


def remove_stale_temporaries(root: Path) -> list[str]:
    """Remove what interrupted saves have left in `root`; returns the names. Rank 0 only, before any save."""
    if not root.is_dir():
        return []
    stale = sorted(path for path in root.iterdir() if _TEMPORARY.fullmatch(path.name))
    for path in stale:
        discard(path)
    return [path.name for path in stale]


def temporary_path(final: Path) -> Path:
    """A fresh name beside `final` that `temporaries_of` recognises."""
    return final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")


def temporaries_of(final: Path) -> list[Path]:
    """What there is beside `final` under a name of `temporary_path`'s, sorted."""
    pattern = re.compile(re.escape(final.name) + _SUFFIX)
    return sorted(path for path in final.parent.iterdir() if pattern.fullmatch(path.name))


def discard(path: Path) -> None:
    """Remove a directory and all below it, a file, or a link (never what it points to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_directory(directory: Path) -> None:
    """Remove a directory so that it is never half there under its own name."""
    doomed = temporary_path(directory)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def replace_text(path: Path, text: str) -> None:
    """Write a small file by temporary name, fsync and rename."""
    temporary = temporary_path(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a finished, synced directory its final name; what is there under that name goes away.

    Where the file system can exchange two names, one of the two has the final name at any moment.
    """
    if not final.exists():
        temporary.rename(final)
        doomed = None
    elif _exchange(temporary, final):
        doomed = temporary
    else:
        doomed = temporary_path(final)
        final.rename(doomed)
        try:
            temporary.rename(final)
        except OSError:
            doomed.rename(final)
            raise
    sync_directory(final.parent)
    if doomed is not None:
        shutil.rmtree(doomed, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """fsync every file and directory below `directory`, and itself."""
    for name in files_below(directory):
        _sync_file(directory / name)
    for path in directory.rglob("*"):
        if path.is_dir():
            sync_directory(path)
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """fsync a directory: its entries survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Give each the other's name in one step; False where the system (not Linux, NFS) cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _make_temporary(final: Path, replace: bool) -> Path:
    if final.exists() and not replace:
        raise CheckpointError(
            f"{final} exists already and is never written into; remove it or save elsewhere"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(final)
    temporary.mkdir()
    return temporary


def _check_shared(temporary: Path) -> None:
    if not temporary.is_dir():
        raise CheckpointError(
            f"{temporary.parent} is not the same directory on every rank; --save must be on a file system "
            "that all nodes share"
        )


def _sync_own_files(temporary: Path, known: Mapping[str, str]) -> dict[str, str]:
    """fsync and hash what this rank wrote: its `__{rank}_*.distcp`; rank 0 also everything else.

    Files with a `known` hash were synced when they were written.
    """
    rank, _ = rank_and_world_size()
    rest = [name for name in files_below(temporary) if _writer_of(name) == rank and name not in known]
    for name in rest:
        _sync_file(temporary / name)
    return {**known, **file_hashes(temporary, rest)}


def _writer_of(name: str) -> int:
    match = _RANK_FILE.fullmatch(name)
    return int(match[1]) if match else 0


def _publish(root: Path, name: CheckpointName, temporary: Path, hashes: dict[str, str]) -> None:
    write_integrity(temporary, hashes)
    sync_tree(temporary)
    publish_directory(temporary, root / directory_name(name))
    write_tracker(root, name)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
