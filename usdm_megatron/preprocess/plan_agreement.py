"""Whether the parts on disk are of this run's options and input, and their end where they are not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from usdm_megatron.data.file_writing import open_locked, reported, write_atomically
from usdm_megatron.data.token_store import SourceFile
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.part_files import StaleParts
from usdm_megatron.preprocess.parts_plan import PLAN_NAME, PUBLISHED_NAME, Input, PartsPlan
from usdm_megatron.preprocess.source_hashes import group_name

_NAMED_FILES = 5


class EditedInput(StaleParts):
    """The same files with other content: what was made of them before is of no use to anybody."""


def agree_on_plan(directory: Path, plan: PartsPlan, inputs: Mapping[str, Input]) -> None:
    """Write the plan, or compare it with the one of an earlier run or another shard.

    A `StaleParts` names every field and file that differs: parts of different plans must not be mixed.
    """
    path = directory / PLAN_NAME
    with reported(path):
        directory.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_atomically(path, plan.to_json())
            return
    there = PartsPlan.read(directory)
    if there.id == plan.id:
        return
    changes = [
        f"{name} was {_brief(before)}, is {_brief(now)}"
        for name, (before, now) in _differences(there, plan).items()
    ]
    edited = _edited_files(directory, there, plan, inputs)
    kind = EditedInput if edited and not changes else StaleParts
    if there.stores != plan.stores:
        changes += edited[:_NAMED_FILES] or [_other_files(there, plan)]
    raise kind(
        f"{directory}: its parts were made with other options or from other input: {'; '.join(changes)}. "
        "Use the same ones to go on, or pass --overwrite to discard the parts (with --shard: remove the "
        "directory first), or choose another --output-prefix"
    )


def sources_path(directory: Path, number: int) -> Path:
    return directory / f"sources-{number:05d}.json"


def read_source(path: Path, plan_id: str) -> SourceFile:
    """A record of input files; `DataError` if it is damaged or of another plan."""
    try:
        record = json.loads(path.read_bytes())
        if record.pop("plan") == plan_id:
            return SourceFile.from_record(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise DataError(f"{path}: damaged, or of other options; remove it and make the parts again")


def edited_input(name: str, directory: Path) -> EditedInput:
    """What `agree_on_plan` cannot see: a file of the same size."""
    return EditedInput(
        f"{name}: changed since parts were made of it; remove {directory} to make them again, or choose "
        "another --output-prefix"
    )


def holds_no_part(directory: Path) -> bool:
    return not any(directory.glob("part-*.json"))


def discard_parts(directory: Path) -> None:
    """Remove the parts of other runs; `DataError` where one is making them now."""
    with ExitStack() as stack:
        for lock in sorted(directory.glob("*.lock")):
            with reported(lock):
                stack.enter_context(open_locked(lock, f"{directory}, {lock.stem}"))
        remove_parts(directory)


def remove_parts(directory: Path) -> None:
    """The record that all is published goes last: a rerun then has nothing to do."""
    last = [directory / PLAN_NAME, directory / PUBLISHED_NAME]
    with reported(directory):
        for path in sorted(directory.iterdir()):
            if path not in last:
                path.unlink()
        for path in last:
            path.unlink(missing_ok=True)
        directory.rmdir()


def _edited_files(
    directory: Path, there: PartsPlan, plan: PartsPlan, inputs: Mapping[str, Input]
) -> list[str]:
    """Input files that have another size, where all have the names that they had; else none."""
    try:
        paths = sorted(directory.glob("sources-*.json"))
        before = [read_source(path, there.id) for path in paths]
    except DataError:
        return []
    now = list(_groups(plan, inputs))
    if [source.name for source in before] != [name for name, _ in now]:
        return []
    return [
        f"{source.name} had {source.bytes:,} bytes, has {size:,}"
        for source, (_, size) in zip(before, now, strict=True)
        if source.bytes != size
    ]


def _groups(plan: PartsPlan, inputs: Mapping[str, Input]) -> Iterator[tuple[str, int]]:
    """Name and size of the files that are hashed together, as `hash_files` records them."""
    for store, given in inputs.items():
        for group in plan.stores[store].file_groups():
            files = given.files[group.start : group.stop]
            yield group_name(files), sum(path.stat().st_size for _, path in files)


def _other_files(there: PartsPlan, plan: PartsPlan) -> str:
    was, now = (
        f"{sum(store.files for store in one.stores.values()):,} files of "
        f"{sum(store.bytes for store in one.stores.values()):,} bytes"
        for one in (there, plan)
    )
    return f"the input was {was}, is {now}" if was != now else f"the {now} have other names"


def _differences(before: PartsPlan, now: PartsPlan) -> dict[str, tuple[Any, Any]]:
    """Options that differ, by name."""
    flat = [_flattened(json.loads(plan.to_json()) | {"stores": {}}) for plan in (before, now)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return {
        name: (flat[0].get(name), flat[1].get(name))
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    }


def _flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}…{text[-1]}"
