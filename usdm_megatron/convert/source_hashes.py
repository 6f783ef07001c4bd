"""Which hash every file of a source should have, and a thread that looks whether it has.

A flipped byte in a weight file loads silently otherwise. Three places record hashes: an `integrity.json`
beside the files (what this package exports carries one), the hub's cache, and the directory that
`hf download --local-dir` fills.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE
from usdm_megatron.convert.foreign_bytes import first_problems, is_file, named, read_small_json
from usdm_megatron.errors import ConversionError

_BLOCK_BYTES = 1 << 20
_MOST_INTEGRITY_BYTES = 4 << 20
_MOST_METADATA_BYTES = 4 << 10
_ETAG = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # of other lengths from other servers: no hash that we know
_MODEL_CARD = "README.md"  # read by no conversion, nor downloaded for one
_CLOCK_TOLERANCE_S = 1  # as huggingface_hub 2.4, `_local_folder.py: read_download_metadata`


@dataclass(frozen=True)
class ExpectedHash:
    """A file's hash as `recorded_by` says; `git-sha1` is git's hash of a blob (the hub's for small files)."""

    algorithm: Literal["sha256", "git-sha1"]
    hex: str
    recorded_by: str


def expected_hashes(directory: Path) -> dict[str, ExpectedHash]:
    """The recorded hashes by file name; empty for a directory that nobody keeps record of.

    Raises `ConversionError` for an `integrity.json` that cannot be read.
    """
    return {**_of_local_download(directory), **_of_hub_cache(directory), **_of_integrity_file(directory)}


class WeightHasher:
    """Hashes files in a thread while they are converted; its reading is the conversion's read-ahead.

    `with WeightHasher(directory, names) as hasher:` starts it; leaving before `result()` cancels.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """`on_bytes(n)` is called in the thread for every `n` more bytes that are hashed.

        Raises `ConversionError` as `expected_hashes` does.
        """
        self._directory = directory
        self._names = list(dict.fromkeys(names))
        self._expected = expected_hashes(directory)
        self._on_bytes = on_bytes or (lambda _: None)
        self._stopped = threading.Event()
        self._found: dict[str, str] = {}
        self._problems: list[str] = [
            f"{directory / named(name)} is missing; {INTEGRITY_FILE} names it: copy the directory again"
            for name, expected in self._expected.items()
            if expected.recorded_by == INTEGRITY_FILE
            and name not in self._names  # these are found missing below
            and name != _MODEL_CARD
            and not is_file(directory / name)
        ]
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="weight-hasher", daemon=True)

    def __enter__(self) -> WeightHasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def result(self) -> dict[str, str]:
        """Wait; sha256 by name, in the order of the names.

        Raises `ConversionError` with every file that cannot be read or differs from its record, and
        what `on_bytes` raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._problems:
            raise ConversionError(*first_problems(self._problems))
        if len(self._found) < len(self._names):
            raise RuntimeError("the hashing was cancelled")
        return self._found

    def _run(self) -> None:
        try:
            for name in self._names:
                try:
                    self._hash(name)
                except OSError as error:
                    self._problems.append(f"{self._directory / name} cannot be read: {error.strerror}")
                if self._stopped.is_set():
                    return
        except BaseException as error:  # handed back by `result`
            self._error = error

    def _hash(self, name: str) -> None:
        path = self._directory / name
        expected = self._expected.get(name)
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        with path.open("rb", buffering=0) as file:
            sha256 = hashlib.sha256()
            # Git hashes the size along with the content.
            git_sha1 = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
            digests = {"sha256": sha256, "git-sha1": git_sha1}
            wanted = {"sha256", expected.algorithm} if expected else {"sha256"}
            while count := file.readinto(buffer):
                if self._stopped.is_set():
                    return
                for algorithm in wanted:
                    digests[algorithm].update(buffer[:count])
                self._on_bytes(count)
        self._found[name] = sha256.hexdigest()
        meant = ", or remove integrity.json if you changed the file on purpose"
        if expected is None or expected.recorded_by != INTEGRITY_FILE:
            meant = ""
        if expected and (found := digests[expected.algorithm].hexdigest()) != expected.hex:
            self._problems.append(
                f"{path} differs from what {expected.recorded_by} recorded ({expected.algorithm} "
                f"{found[:12]}…, recorded {expected.hex[:12]}…); download or copy it again{meant}"
            )


def _of_integrity_file(directory: Path) -> dict[str, ExpectedHash]:
    path = directory / INTEGRITY_FILE
    if not is_file(path):
        return {}
    record = read_small_json(path, _MOST_INTEGRITY_BYTES)
    files = record.get("files")
    if (
        record.get("algorithm") != "sha256"
        or not isinstance(files, dict)
        or not all(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in files.values())
    ):
        raise ConversionError(
            f"{path} is damaged: expected sha256 hashes by file name; copy it again, or remove it if the "
            "files are known to be good"
        )
    return {name: ExpectedHash("sha256", value, INTEGRITY_FILE) for name, value in files.items()}


def _of_hub_cache(directory: Path) -> dict[str, ExpectedHash]:
    """A snapshot's files are links to `../../blobs/ETAG` (huggingface_hub 2.4, `file_download.py`)."""
    links = (path for path in directory.iterdir() if path.is_symlink())
    targets = {path.name: Path(os.readlink(path)) for path in links}
    return {
        name: _of_etag(target.name)
        for name, target in targets.items()
        if target.parent.name == "blobs" and _ETAG.fullmatch(target.name)
    }


def _of_local_download(directory: Path) -> dict[str, ExpectedHash]:
    """`.cache/huggingface/download/NAME.metadata`: lines commit, etag, time of the download.

    A file that was written later is somebody's own, and its record means nothing.
    """
    hashes = {}
    for path in (directory / ".cache" / "huggingface" / "download").glob("*.metadata"):
        name = path.name.removesuffix(".metadata")
        if not is_file(path) or not is_file(directory / name):
            continue
        with path.open("rb") as file:
            lines = file.read(_MOST_METADATA_BYTES).decode("utf-8", "replace").split("\n")
        etag, recorded_at = (lines[1].strip(), _number(lines[2])) if len(lines) > 2 else ("", math.nan)
        written_at = (directory / name).stat().st_mtime
        if _ETAG.fullmatch(etag) and written_at - _CLOCK_TOLERANCE_S <= recorded_at:
            hashes[name] = _of_etag(etag)
    return hashes


def _of_etag(etag: str) -> ExpectedHash:
    return ExpectedHash("sha256" if len(etag) == 64 else "git-sha1", etag, "the hub")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # compares false with every time
