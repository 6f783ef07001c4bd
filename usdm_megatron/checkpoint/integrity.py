"""`integrity.json`: the sha256 of every file of a checkpoint, written last and checked first.

A flipped byte in a `.distcp` or `.safetensors` file loads silently otherwise. The format is
that of Megatron-LM's main branch: `{"algorithm": "sha256", "files": {name: hex}}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from usdm_megatron.file_reading import file_sha256

INTEGRITY_FILE = "integrity.json"
_THREADS = 4  # hashlib releases the interpreter lock


def files_below(directory: Path) -> list[str]:
    """Relative names of all files below `directory`, sorted, without `integrity.json`."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in names if name != INTEGRITY_FILE)


def file_hashes(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 by name for files below `directory`."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: file_sha256(directory / name), names), strict=True))


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


def verify_integrity(directory: Path) -> list[str]:
    """Every way in which `directory` is not what was written, one sentence each; empty when it is.

    Files that `integrity.json` does not name are no problem: nothing reads them.
    """
    path = directory / INTEGRITY_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files = record["files"]
        algorithm = record["algorithm"]
        well_formed = bool(files) and all(isinstance(value, str) for value in files.values())
    except FileNotFoundError:
        return [f"{path} is missing: the checkpoint was not finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} cannot be read: {error}"]
    if algorithm != "sha256" or not well_formed:
        return [f"{path} is damaged: expected sha256 hashes by file name"]
    problems = []
    readable = []
    for name in sorted(files):
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            problems.append(f"{path} names {name!r}, which is outside the checkpoint")
        elif not (directory / name).is_file():
            problems.append(f"{directory / name} is missing")
        else:
            readable.append(name)
    try:
        found = file_hashes(directory, readable)
    except OSError as error:
        return [*problems, f"{directory} cannot be read: {error}"]
    problems += [
        f"{directory / name} differs from what was written (sha256 {found[name][:12]}…, "
        f"recorded {files[name][:12]}…)"
        for name in readable
        if found[name] != files[name]
    ]
    return problems
