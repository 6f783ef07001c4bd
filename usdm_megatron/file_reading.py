"""Two ways of reading that every floor needs: a JSON object, and a file's hash."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from usdm_megatron.errors import ConversionError

_BLOCK_BYTES = 1 << 20
_MOST_JSON_BYTES = 256 << 20  # the largest tokenizers take 40 MB; parsing takes ten times the size


def file_sha256(path: Path, stopped: threading.Event | None = None) -> str:
    """sha256 of a file's bytes, in hex; gives up (with a partial hash) once `stopped` is set."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while not (stopped and stopped.is_set()) and (block := file.read(_BLOCK_BYTES)):
            digest.update(block)
    return digest.hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises `ConversionError` when it does not."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ConversionError(f"{path} is larger than {_MOST_JSON_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return content
