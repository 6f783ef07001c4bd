"""What `sft.py` trains: one Mistral in both formats, dialogs of the original's shape; always the same."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.vocab import Vocabulary

IGNORED = -100
ADAPTER_FILE, ADAPTER_SEED = "first_a.safetensors", 42
# A dialog of the original: 46 ids of instruction and header, the user's units, what he says, the header of
# the agent, what it says, its units, a tail of two. Loss on all that is said and on the agent's units.
_INSTRUCTION, _HEADER, _TAIL = 46, 5, 2
_UNITS_A_SECOND, _WORD_IDS_A_SECOND = 50, 4
_MEAN_S, _SIGMA, _SHORTEST_S = 2.2, 0.6, 0.5  # of a turn, log-normal


@dataclass(frozen=True)
class Shape:
    """A Mistral small enough for a CPU, its vocabulary so small that layers decide, as in the original."""

    layers: int = 8
    hidden: int = 512
    ffn: int = 1792
    heads: int = 8
    kv_heads: int = 2
    window: int = 512
    text_ids: int = 2000
    units: int = 1000

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(text_size=self.text_ids, unit_count=self.units)


@dataclass(frozen=True)
class Dialogs:
    """Rows of ids, and labels that are -100 where there is no loss, not shifted."""

    ids: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.ids])


def make_dialogs(count: int, vocabulary: Vocabulary, seed: int = 0) -> Dialogs:
    """Random ids, lengths of speech."""
    rng = np.random.default_rng(seed)
    every_ids, every_labels = [], []
    for _ in range(count):
        turns_s = np.maximum(rng.lognormal(np.log(_MEAN_S) - _SIGMA**2 / 2, _SIGMA, size=2), _SHORTEST_S)
        user_units, agent_units = (_UNITS_A_SECOND * turns_s).astype(int).tolist()
        user_text, agent_text = (_WORD_IDS_A_SECOND * turns_s).astype(int).tolist()
        is_unit, is_target = (
            np.repeat(pattern, (_INSTRUCTION, user_units, user_text, _HEADER, agent_text, agent_units, _TAIL))
            for pattern in ([False, True, False, False, False, True, False], [0, 0, 1, 0, 1, 1, 0])
        )
        units = rng.integers(0, vocabulary.unit_count, len(is_unit)) + vocabulary.first_unit_id
        text = rng.integers(vocabulary.eos_id + 1, vocabulary.text_size, len(is_unit))
        ids = np.where(is_unit, units, text)
        ids[0], ids[-1] = vocabulary.bos_id, vocabulary.eos_id
        every_ids.append(ids)
        every_labels.append(np.where(is_target.astype(bool), ids, IGNORED))
    return Dialogs(tuple(every_ids), tuple(every_labels))


def write_store(prefix: Path, dialogs: Dialogs, vocabulary: Vocabulary) -> None:
    """A dialog a row, with its loss mask."""
    longest = int(dialogs.lengths.max())
    with TokenStoreWriter(prefix, vocabulary, row_capacity=longest, with_loss_mask=True) as writer:
        writer.append(
            np.concatenate(dialogs.ids),
            dialogs.lengths,
            np.ones(len(dialogs.ids), dtype=np.int64),
            loss_mask=(np.concatenate(dialogs.labels) != IGNORED).astype(np.uint8),
        )
        writer.finish()


def write_model(hf: Path, root: Path, shape: Shape) -> None:
    """Random weights as a Hugging Face directory, and converted."""
    import torch
    import transformers
    from transformers import MistralConfig, MistralForCausalLM

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=shape.vocabulary.size,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        sliding_window=shape.window,
        max_position_embeddings=8192,
        rope_theta=1e4,
        tie_word_embeddings=False,
    )
    MistralForCausalLM(config).save_pretrained(hf)
    _convert(hf, root, shape.vocabulary)


def _convert(hf: Path, root: Path, vocabulary: Vocabulary) -> None:
    """As the converter does, but for the vocabulary, which it would read from a tokenizer."""
    from usdm_megatron.checkpoint.facts import megatron_common, write_facts
    from usdm_megatron.checkpoint.streamed import save_streamed
    from usdm_megatron.convert.hf_source import open_source
    from usdm_megatron.convert.import_plan import empty_objects, plan_import, streamed_tensors
    from usdm_megatron.convert.options import ImportOptions

    plan = plan_import(open_source(hf), ImportOptions(hf_path=str(hf), save=root))
    plan = dataclasses.replace(plan, vocabulary=vocabulary)
    save_streamed(
        root,
        "release",
        list(streamed_tensors(plan)),
        empty_objects(plan),
        megatron_common(plan.hf_config, vocabulary, 0, plan.weight_type),
        lambda directory: write_facts(
            directory, hf_config=plan.hf_config, vocabulary=vocabulary, provenance={}, tokenizer_dir=None
        ),
    )


def write_first_a(path: Path, hf: Path, r: int) -> None:
    """The A of every projection as a run of ours draws it, by PEFT's names: for the peer to start from."""
    from safetensors.torch import save_file

    from usdm_megatron.architecture import HFArchitecture
    from usdm_megatron.lora_spec import TARGETS
    from usdm_megatron.model.lora.adapter import initial_a
    from usdm_megatron.model.lora.names import LORA_A, PROJECTIONS, adapter_entries, entry_shape

    model = HFArchitecture.from_hf_config(json.loads((hf / "config.json").read_text()))
    projections = {projection.target: projection for projection in PROJECTIONS}
    factors = [e for e in adapter_entries(TARGETS, model, train_new_embeddings=False) if e.part == LORA_A]
    save_file(
        {
            entry.peft_name(layer): initial_a(
                projections[entry.hf_module.rpartition(".")[2]],
                layer or 0,
                r,
                entry_shape(entry, model, r)[1],
                ADAPTER_SEED,
            )
            for entry in factors
            for layer in entry.layers(model)
        },
        path,
    )
