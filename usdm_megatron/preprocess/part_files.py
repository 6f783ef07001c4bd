"""One part of the work on disk: named arrays in one file, and a record beside it that is written last.

    part-00012.bin   the arrays, each beginning at a multiple of 64 bytes
    part-00012.json  which arrays, sha256 of the file, the plan it was made by, what else is known

The bytes depend on the arrays and facts alone. A part is there when its record is, and whole when the
file has the recorded hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.data.file_writing import reported, write_atomically
from usdm_megatron.errors import DataError
from usdm_megatron.file_reading import file_sha256

FORMAT_VERSION = 2
_ALIGNMENT_BYTES = 64
_DTYPES = {dtype.str: dtype for dtype in map(np.dtype, ("<u2", "<i4", "|u1", "<u8", "<i8"))}


class StaleParts(DataError):
    """Parts on disk are of other options or of other input than this run's."""


@dataclass(frozen=True)
class PartFiles:
    """The two files of part `number` in `directory`."""

    directory: Path
    number: int

    @property
    def bin(self) -> Path:
        return self.directory / f"part-{self.number:05d}.bin"

    @property
    def json(self) -> Path:
        return self.directory / f"part-{self.number:05d}.json"


@dataclass(frozen=True)
class Part:
    """A part as it was written: read-only views of the map, and its facts."""

    files: PartFiles
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    sha256: str

    def is_whole(self) -> bool:
        """Whether every byte is as it was written; reads the file."""
        return file_sha256(self.files.bin) == self.sha256


def write_part(
    files: PartFiles, plan_id: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Write a part made by the plan `plan_id`; the record, which says that it is there, comes last."""
    pieces: list[bytes | memoryview] = []
    places = {}
    digest, at = hashlib.sha256(), 0
    for name, array in arrays.items():
        if array.dtype.str not in _DTYPES or array.ndim != 1:
            raise ValueError(f"{name}: a part holds no {array.dtype} of {array.ndim} dimensions")
        data = np.ascontiguousarray(array).view(np.uint8).data
        padding = bytes(-len(data) % _ALIGNMENT_BYTES)
        pieces += [data, padding]
        places[name] = {"dtype": array.dtype.str, "offset": at, "count": len(array)}
        at += len(data) + len(padding)
    for piece in pieces:
        digest.update(piece)
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "plan": plan_id,
        "bytes": at,
        "sha256": digest.hexdigest(),
        "arrays": places,
        "facts": dict(facts),
    }
    record["record_sha256"] = _record_sha256(record)
    with reported(files.bin):
        files.json.unlink(missing_ok=True)  # of a part that was not whole
        write_atomically(files.bin, *pieces)
        write_atomically(files.json, json.dumps(record, indent=1).encode())


def open_part(files: PartFiles, plan_id: str) -> Part | None:
    """Part of the plan `plan_id`, mapped but unread; None if it is not there or not of the right size.

    A `StaleParts` if another plan made it: its samples must not be mixed with ours.
    """
    try:
        record = json.loads(files.json.read_bytes())
        made_by, size, places = record["plan"], record["bytes"], record["arrays"]
        if record["format_version"] == FORMAT_VERSION and made_by == plan_id:
            if files.bin.stat().st_size != size or record.pop("record_sha256") != _record_sha256(record):
                return None
            raw = np.memmap(files.bin, np.uint8, "r").view(np.ndarray) if size else np.zeros(0, np.uint8)
            arrays = {name: _view(raw, **place) for name, place in places.items()}
            return Part(files, arrays, dict(record["facts"]), str(record["sha256"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None  # damaged: made again
    raise StaleParts(
        f"{files.json}: was made with other options or from other input, or by another version; "
        f"remove {files.directory} or choose another --output-prefix"
    )


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _view(raw: np.ndarray, *, dtype: str, offset: int, count: int) -> np.ndarray:
    kind = _DTYPES[dtype]
    if min(offset, count) < 0 or offset + count * kind.itemsize > len(raw):
        raise ValueError("an array outside of the file")
    return raw[offset : offset + count * kind.itemsize].view(kind)
