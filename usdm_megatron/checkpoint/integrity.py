"""`integrity.json`: the sha256 of every file of a checkpoint, written last.

A flipped byte in a `.distcp` or `.safetensors` file loads silently otherwise. The format is
that of Megatron-LM's main branch: `{"algorithm": "sha256", "files": {name: hex}}`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from usdm_megatron.checkpoint.threads import run_in_threads
from usdm_megatron.file_reading import file_sha256

OnBytes = Callable[[int], None]
# `progress(what, total bytes)` is left when all of it is done; what it gives is called with every n bytes
ByteProgress = Callable[[str, int], AbstractContextManager[OnBytes]]

INTEGRITY_FILE = "integrity.json"
_WEIGHTS = ".distcp"
_THREADS = 4  # hashlib releases the interpreter lock


def files_below(directory: Path) -> list[str]:
    """Relative names of all files below `directory`, sorted, without `integrity.json`."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != INTEGRITY_FILE)


@contextmanager
def no_progress(_what: str, _total_bytes: int) -> Iterator[OnBytes]:
    """A `ByteProgress` that shows nothing."""
    yield lambda _: None


def file_hashes(directory: Path, names: Iterable[str], on_bytes: OnBytes = lambda _: None) -> dict[str, str]:
    """sha256 by name for files below `directory`."""

    def digest(name: str, stopped: threading.Event) -> str:
        return file_sha256(directory / name, stopped, on_bytes)

    names = list(names)
    hashes = run_in_threads([partial(digest, name) for name in names], min(_THREADS, os.cpu_count() or 1))
    return dict(zip(names, hashes, strict=True))


def write_integrity(directory: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Write `integrity.json` over every file below `directory` and fsync it.

    `hashes` are those already known (each rank hashes what it wrote); the rest is hashed here.
    """
    known = dict(hashes or {})
    missing = [name for name in files_below(directory) if name not in known]
    known.update(file_hashes(directory, missing))
    record = {"algorithm": "sha256", "files": dict(sorted(known.items()))}
    path = directory / INTEGRITY_FILE
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def verify_integrity(
    directory: Path, progress: ByteProgress = no_progress, *, weights: bool = True
) -> list[str]:
    """Every way in which `directory` is not what was written, one sentence each; empty when it is.

    What torch opens must be named by `integrity.json`. Other files that it does not name are no problem:
    nothing reads them. `weights=False` only looks whether the `.distcp` files are there: all others are
    small, and read in no time.
    """
    if not directory.is_dir():
        return [f"{directory} is missing"]
    path = directory / INTEGRITY_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = record["files"]
        algorithm = record["algorithm"]
        well_formed = bool(files) and all(isinstance(value, str) for value in files.values())
    except FileNotFoundError:
        return [f"{path} is missing: the checkpoint was not finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{path} cannot be read: {error}"]
    if algorithm != "sha256" or not well_formed:
        return [f"{path} is damaged: expected sha256 hashes by file name"]
    if outside := [name for name in sorted(files) if _is_outside(name)]:
        return [f"{path} names {name!r}, which is outside the checkpoint" for name in outside]
    problems = [
        f"{directory / name} is not named by {INTEGRITY_FILE}: it was put there by somebody else; remove it"
        for name in _files_that_torch_opens(directory)
        if name not in files
    ]
    readable = []
    for name in sorted(files):
        if not (directory / name).is_file():
            problems.append(f"{directory / name} is missing")
        elif weights or not name.endswith(_WEIGHTS):
            readable.append(name)
    try:
        total_bytes = sum((directory / name).stat().st_size for name in readable)
        with progress("checking", total_bytes) as on_bytes:
            found = file_hashes(directory, readable, on_bytes)
    except OSError as error:
        return [*problems, f"{directory} cannot be read: {error}"]
    problems += [
        f"{directory / name} differs from what was written (sha256 {found[name][:12]}…, "
        f"recorded {files[name][:12]}…)"
        for name in readable
        if found[name] != files[name]
    ]
    return problems


def _is_outside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.parts or ".." in path.parts or path.is_absolute()


def _files_that_torch_opens(directory: Path) -> list[str]:
    """Pickles, or files with pickles inside, of a torch_dist checkpoint."""
    names = (path.name for path in directory.iterdir())
    return sorted(name for name in names if name in (".metadata", "common.pt") or name.endswith(_WEIGHTS))
