"""`README.md` of an exported model: where its weights come from and how they were trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from usdm_megatron.checkpoint.facts import RUN_CONFIG_FILE, CheckpointFacts
from usdm_megatron.convert.name_table import ArchitectureTable
from usdm_megatron.convert.weight_types import TypeName, transformers_name

_STATE_FILE = "train_state.json"
# Sections of a run's configuration that say how the weights came about; the others hold paths and logs.
_TRAINING_SECTIONS = ("training", "optimizer")
_DATA_KEYS = ("seq_length", "micro_batch_size", "global_batch_size", "shuffle")


def model_card(facts: CheckpointFacts, table: ArchitectureTable, weight_type: TypeName) -> str:
    """Markdown with the hub's metadata in front; no time, host or path."""
    source = facts.provenance.get("source")
    front = {"library_name": "transformers", "tags": ["usdm", "speech-text"]}
    if isinstance(source, str) and "/" in source:  # a hub id
        front["base_model"] = source
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {table.export_as}{', speech-text' if facts.vocabulary.has_speech else ''}",
        "",
        f"Exported by usdm_megatron from {_origin(facts)}. transformers and vLLM load it as it is.",
        "",
        *_table("Model", _model(facts, weight_type)),
        *_table("Vocabulary", _vocabulary(facts)),
        *_table("Source of the weights", _source(facts)),
    ]
    if facts.kind == "run":
        lines += _table("Training", _training(facts))
    return "\n".join(lines).rstrip() + "\n"


def _origin(facts: CheckpointFacts) -> str:
    return "a converted model" if facts.kind == "converted" else f"step {facts.iteration:,} of a training run"


def _model(facts: CheckpointFacts, weight_type: TypeName) -> dict[str, Any]:
    model = facts.architecture
    return {
        "layers": model.layers,
        "hidden size": model.hidden,
        "attention heads / kv heads": f"{model.heads} / {model.kv_heads}",
        "sliding window": model.sliding_window,
        "type": transformers_name(weight_type),
    }


def _vocabulary(facts: CheckpointFacts) -> dict[str, Any]:
    vocabulary = facts.vocabulary
    rows: dict[str, Any] = {"ids": vocabulary.size, "text": f"0 to {vocabulary.text_size - 1}"}
    if vocabulary.has_speech:
        last_unit = vocabulary.first_unit_id + vocabulary.unit_count - 1
        rows |= {
            "`<|continue|>`": vocabulary.continue_id,
            "`<|correspond|>`": vocabulary.correspond_id,
            "`<|unit0|>` …": f"{vocabulary.first_unit_id} to {last_unit}",
            "`<pad>`": vocabulary.pad_id,
        }
    rows |= {
        f"`{token}`": vocabulary.pad_id + 1 + number for number, token in enumerate(vocabulary.extra_tokens)
    }
    return rows


def _source(facts: CheckpointFacts) -> dict[str, Any]:
    record = facts.provenance
    rows = {name: record.get(name) for name in ("source", "revision")}
    rows |= {f"option {name}": value for name, value in dict(record.get("options") or {}).items()}
    return rows | {f"sha256 of {name}": digest for name, digest in dict(record.get("files") or {}).items()}


def _training(facts: CheckpointFacts) -> dict[str, Any]:
    config = yaml.safe_load((facts.directory / RUN_CONFIG_FILE).read_text(encoding="utf-8"))
    rows: dict[str, Any] = {"steps": facts.iteration, "recipe": config.get("recipe")}
    state = facts.directory / _STATE_FILE
    if state.is_file():
        rows["rows read"] = json.loads(state.read_text(encoding="utf-8")).get("consumed_rows")
    data = dict(config.get("data") or {})
    rows |= {name: data.get(name) for name in _DATA_KEYS}
    for section in _TRAINING_SECTIONS:
        rows |= dict(config.get(section) or {})
    return rows


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    said = {name: value for name, value in rows.items() if value is not None}
    return [
        f"## {title}",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in said.items()),
        "",
    ]
