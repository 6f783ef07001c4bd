"""`RunConfig` to and from YAML, and the layers that a command line is merged from.

Lowest first: dataclass defaults, task, recipe, `--config` file, command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from usdm_megatron.config import RunConfig
from usdm_megatron.errors import ConfigError
from usdm_megatron.recipes import DEFAULT_RECIPE, RecipeName, Task, recipe_fields, task_fields

Sections = dict[str, Any]  # section name → section dataclass
_NAMES = ("task", "recipe")  # keys of a file that are no sections


def section_types() -> dict[str, type]:
    """Section name → dataclass, in the order of `RunConfig`."""
    hints = typing.get_type_hints(RunConfig)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(RunConfig)
        if dataclasses.is_dataclass(hints[field.name])
    }


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The raw tree of a YAML file: `task`, `recipe` and sections, every key and type checked.

    Raises `ConfigError` with every unknown key (and what it may have meant) and every wrong type.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}; give a YAML file") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path}: holds a {type(tree).__name__}; sections as in RunConfig are expected"
        )
    problems: list[str] = []
    known = {*_NAMES, *section_types()}
    result: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in known:
            problems.append(f"--config {path}: {name}: unknown key{_suggestion(str(name), known)}")
        elif name in _NAMES:
            result[name] = _checked(
                value, typing.get_type_hints(RunConfig)[name], f"{path}: {name}", problems
            )
        elif not isinstance(value, dict):
            problems.append(f"--config {path}: {name}: is {value!r}; it must be a section with fields")
        else:
            result[name] = _read_section(path, name, value, problems)
    if problems:
        raise ConfigError(*problems)
    return result


def layered_defaults(
    recipe: RecipeName | None, tree: dict[str, Any], *, task: Task = "pretrain", **machine: dict[str, Any]
) -> tuple[str, Sections]:
    """The recipe's name and each section below the command line of `task`.

    `machine` gives section → fields that depend on the machine (bf16 on CUDA), below recipe and file.
    """
    name: RecipeName = recipe or tree.get("recipe", DEFAULT_RECIPE)
    if recipe is not None and tree.get("recipe", recipe) != recipe:
        # the file was resolved under another recipe: that recipe's own choices give way, its edits stay
        previous = recipe_fields(tree["recipe"], task)
        tree = {
            section: {k: v for k, v in fields.items() if previous.get(section, {}).get(k, _UNSET) != v}
            if isinstance(fields, dict)
            else fields
            for section, fields in tree.items()
        }
    layers = (machine, task_fields(task), recipe_fields(name, task), tree)
    sections = {
        section: cls(**{field: value for layer in layers for field, value in layer.get(section, {}).items()})
        for section, cls in section_types().items()
    }
    return name, sections


def dump_config(config: RunConfig) -> str:
    """YAML of the whole tree; `read_config_file` on it gives the same configuration."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def load_config(path: str | Path) -> RunConfig:
    """The configuration that a `run_config.yaml` describes; of `pretrain` where it names no task."""
    tree = read_config_file(path)
    task: Task = tree.get("task", "pretrain")
    name, sections = layered_defaults(None, tree, task=task)
    return RunConfig(task=task, recipe=name, **sections)  # type: ignore[arg-type]  # read_config_file checked


_UNSET = object()


def _read_section(
    path: str | Path, section: str, fields: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    hints = typing.get_type_hints(section_types()[section])
    checked = {}
    for key, value in fields.items():
        if key not in hints:
            problems.append(
                f"--config {path}: {section}.{key}: unknown key{_suggestion(str(key), hints, section)}"
            )
        else:
            checked[key] = _checked(value, hints[key], f"{path}: {section}.{key}", problems)
    return checked


def _suggestion(key: str, known: Any, section: str = "") -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    prefix = f"{section}." if section else ""
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known keys: {', '.join(known)}"


def _checked(value: Any, annotation: Any, where: str, problems: list[str]) -> Any:
    for candidate in _alternatives(annotation):
        ok, converted = _fits(value, candidate)
        if ok:
            return converted
    problems.append(f"--config {where}: is {value!r}; expected {_readable(annotation)}")
    return value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _fits(value: Any, annotation: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return value in typing.get_args(annotation), value
    if origin is tuple:
        return _as_strings(value)
    if annotation is float:
        return _as_float(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, annotation), value


def _as_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return False, value
    if isinstance(value, str):  # YAML 1.1 reads 2e-5 as a string
        try:
            return True, float(value)
        except ValueError:
            return False, value
    return isinstance(value, (int, float)), float(value) if isinstance(value, (int, float)) else value


def _as_strings(value: Any) -> tuple[bool, Any]:
    """A list of strings; one string alone is a list of one, and the weights of a blend may be numbers."""
    items = [value] if isinstance(value, str) else value
    ok = isinstance(items, (list, tuple)) and all(
        isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items
    )
    return ok, tuple(map(str, items)) if ok else value


def _readable(annotation: Any) -> str:
    return " or ".join(map(_readable_part, _alternatives(annotation)))


def _readable_part(part: Any) -> str:
    if part is type(None):
        return "null"
    if typing.get_origin(part) is typing.Literal:
        return ", ".join(map(str, typing.get_args(part)))
    return "list" if typing.get_origin(part) is tuple else getattr(part, "__name__", str(part))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
