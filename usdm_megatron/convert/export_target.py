"""The directory that an export writes: what it may replace, a temporary name, and the renaming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usdm_megatron.checkpoint.commit import (
    discard,
    publish_directory,
    sync_tree,
    temporaries_of,
    temporary_path,
)
from usdm_megatron.checkpoint.facts import CheckpointFacts
from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.convert.destination import (
    claimed,
    is_claimed,
    make_directory,
    require_plain,
    require_space,
)
from usdm_megatron.convert.weight_types import TypeName
from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer.files import check_tokenizer, copy_tokenizer

_KINDS = {"config.json": "Hugging Face model", "adapter_config.json": "PEFT adapter"}


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    path: Path
    checkpoint: Path
    files: tuple[str, ...]
    tensors: int
    weight_type: TypeName
    size_bytes: int
    removed: tuple[str, ...]  # what an interrupted run had left


@dataclass(frozen=True)
class Published:
    """What was written under its final name."""

    size_bytes: int
    removed: tuple[str, ...]  # what an interrupted run had left


def require_replaceable(target: Path, marker: str, *, overwrite: bool) -> None:
    """Refuse a target that is there, unless `overwrite` and it is of the kind that has the file `marker`."""
    require_plain(target, "--hf-path")
    if not target.exists():
        return
    if not overwrite:
        raise ConversionError(f"--hf-path {target} exists; pass --overwrite to replace it, or choose another")
    if not (target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))):
        raise ConversionError(
            f"--hf-path {target} is no {_KINDS[marker]} (no {marker}); --overwrite replaces nothing else"
        )


def publish(target: Path, size_bytes: int, write: Callable[[Path], None]) -> Published:
    """Let `write` fill a directory of about `size_bytes` and give it its name when all of it is there."""
    make_directory(target.absolute().parent)
    removed = _remove_stale(target)
    require_space(target.absolute().parent, size_bytes)
    temporary = temporary_path(target)
    try:
        with claimed(temporary):
            write(temporary)
            written_bytes = sum(path.stat().st_size for path in temporary.iterdir())
            publish_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Published(written_bytes, tuple(removed))


def finish_directory(directory: Path, facts: CheckpointFacts, card: str, hashes: Mapping[str, str]) -> None:
    """What every export has beside weights and config: card, tokenizer, and `integrity.json` last.

    `hashes` are those of the files that were hashed while written.
    """
    (directory / "README.md").write_text(card, encoding="utf-8")
    if facts.tokenizer_dir is not None:
        copy_tokenizer(facts.tokenizer_dir, directory)
        check_tokenizer(directory, facts.vocabulary, known_as=facts.tokenizer_dir)
    write_integrity(directory, hashes)
    sync_tree(directory)


def write_json(path: Path, content: Any) -> None:
    """As transformers and peft write it, in the order given."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_stale(target: Path) -> list[str]:
    """What an interrupted export to this very name has left; returns the names.

    Others' temporaries are not ours, and one that is being written now is another's.
    """
    removed = []
    for path in temporaries_of(target):
        if path.is_dir() and is_claimed(path):
            raise ConversionError(f"--hf-path {target}: another export is writing it now; wait for its end")
        discard(path)
        removed.append(path.name)
    return removed
