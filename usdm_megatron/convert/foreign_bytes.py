"""Files that strangers wrote: read within bounds, and quoted in messages without harm."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from usdm_megatron.errors import ConversionError
from usdm_megatron.file_reading import read_json_object

MOST_PROBLEMS = 1_000  # a 7B model has 291 tensors; beyond this nobody reads on
_LONGEST_NAME = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _LONGEST_NAME


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file, through symbolic links; a name that cannot be one is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, not encodable, behind a closed directory
        return False


def read_small_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """A JSON object of at most `limit_bytes`; parsed, it takes about 25 times as much memory.

    Raises `ConversionError` for anything else, a pipe or a device included.
    """
    if os.path.exists(path) and not is_file(path):  # opening a pipe would wait for ever
        raise ConversionError(f"{path} is not a regular file")
    if is_file(path) and (size := path.stat().st_size) > limit_bytes:
        raise ConversionError(
            f"{path} holds {size:,} bytes; a file of this kind holds at most {limit_bytes:,}: it is no "
            f"{path.name} of a model"
        )
    return read_json_object(path)


def escaped(value: object) -> str:
    """A foreign value as Python writes it, on one short line."""
    return _SHORT.repr(value)


def named(name: str) -> str:
    """A foreign name as it is when that is printable and short, escaped otherwise."""
    return name if name.isprintable() and 0 < len(name) <= _LONGEST_NAME else escaped(name)


def first_problems(problems: Iterable[str]) -> list[str]:
    """As many problems as a message can hold; the rest is never built."""
    remaining = iter(problems)
    first = list(islice(remaining, MOST_PROBLEMS))
    if next(remaining, None) is not None:
        first.append(f"… and more: only the first {MOST_PROBLEMS:,} problems are listed")
    return first
