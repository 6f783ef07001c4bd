"""`README.md` of an exported model or adapter: where its weights come from and how they were trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, read_adapter_facts
from usdm_megatron.checkpoint.facts import RUN_CONFIG_FILE, CheckpointFacts
from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE
from usdm_megatron.convert.name_table import ArchitectureTable
from usdm_megatron.convert.weight_types import TypeName, transformers_name
from usdm_megatron.lora_spec import TARGETS

_STATE_FILE = "train_state.json"
# Sections of a run's configuration that say how the weights came about; the others hold paths and logs.
_TRAINING_SECTIONS = ("training", "optimizer")
_DATA_KEYS = ("seq_length", "micro_batch_size", "global_batch_size", "shuffle")


def model_card(facts: CheckpointFacts, table: ArchitectureTable, weight_type: TypeName) -> str:
    """Markdown with the hub's metadata in front; no time, host or path.

    `facts` of a LoRA checkpoint mean that its adapter was merged.
    """
    source = facts.provenance.get("source")
    front = {"library_name": "transformers", "tags": ["usdm", "speech-text"]}
    if isinstance(source, str) and "/" in source:  # a hub id
        front["base_model"] = source
    adapter = read_adapter_facts(facts.directory)
    return _card(
        front,
        f"{table.export_as}{', speech-text' if facts.vocabulary.has_speech else ''}",
        f"Exported by usdm_megatron from {_origin(facts)}. transformers and vLLM load it as it is.",
        {
            "Model": _model(facts, weight_type),
            "Adapter, merged": _adapter(adapter) if adapter else {},
            **_common_sections(facts),
        },
    )


def adapter_card(
    facts: CheckpointFacts, adapter: AdapterFacts, weight_type: TypeName, hub_id: str | None
) -> str:
    """The same for an adapter alone; `hub_id` is the base's, if it has one."""
    front = {"library_name": "peft", "tags": ["lora", "usdm", "speech-text"]}
    if hub_id is not None:
        front["base_model"] = hub_id
    return _card(
        front,
        f"LoRA adapter{', speech-text' if facts.vocabulary.has_speech else ''}",
        f"Exported by usdm_megatron from {_origin(facts)}. `peft.PeftModel.from_pretrained(base, directory)` "
        "loads it.",
        {
            "Adapter": {**_adapter(adapter), "type": transformers_name(weight_type)},
            **_common_sections(facts),
        },
    )


def _card(front: Mapping[str, Any], title: str, text: str, sections: Mapping[str, dict[str, Any]]) -> str:
    lines = [
        "---",
        yaml.safe_dump(dict(front), sort_keys=True).strip(),
        "---",
        "",
        f"# {title}",
        "",
        text,
        "",
    ]
    for name, rows in sections.items():
        lines += _table(name, rows) if rows else []
    return "\n".join(lines).rstrip() + "\n"


def _common_sections(facts: CheckpointFacts) -> dict[str, dict[str, Any]]:
    return {
        "Vocabulary": _vocabulary(facts),
        "Source of the weights": _source(facts),
        "Training": _training(facts) if facts.kind == "run" else {},
    }


def _adapter(adapter: AdapterFacts) -> dict[str, Any]:
    spec = adapter.spec
    return {
        "r": spec.r,
        "alpha": spec.alpha,
        "dropout": spec.dropout,
        "target modules": ", ".join(target for target in TARGETS if target in spec.targets),
        "rows of new ids": "trained" if spec.train_new_embeddings else "frozen",
        f"base, sha256 of its {INTEGRITY_FILE}": adapter.base_sha256,
    }


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
    rows |= {f"sha256 of {name}": digest for name, digest in dict(record.get("files") or {}).items()}
    adapter = dict(record.get("adapter") or {})
    if adapter:
        rows["adapter's source"] = adapter.get("source")
    return rows | {f"sha256 of {name}": digest for name, digest in dict(adapter.get("files") or {}).items()}


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


def _cell(value: Any) -> str:
    """A bar ends a cell, even inside backticks."""
    return str(value).replace("|", "\\|")


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    said = {name: value for name, value in rows.items() if value is not None}
    return [
        f"## {title}",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in said.items()),
        "",
    ]
