"""A tiny Hugging Face Mistral with odd values, its checkpoint, and rows to feed it.

Odd on purpose: eps 3e-4, theta 1e6, head_dim ≠ hidden / heads, a window shorter than the samples, a
vocabulary that is not a multiple of the padding. A value that is not wired shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.vocab import Vocabulary

WINDOW = 8
VOCABULARY = Vocabulary(text_size=300, unit_count=100)  # 403 ids, padded to 512
MODEL = {
    "vocab_size": VOCABULARY.size,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "max_position_embeddings": 512,
    "rms_norm_eps": 3e-4,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_hf_model(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Random weights, norms included, as an HF directory; returns it."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    model = MistralForCausalLM(MistralConfig(**{**MODEL, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def write_checkpoint(hf_directory: Path, root: Path, vocabulary: Vocabulary = VOCABULARY) -> Path:
    """Convert with a vocabulary of our choice (small ones keep tests fast); returns `root`."""
    from usdm_megatron.checkpoint.facts import megatron_common, write_facts
    from usdm_megatron.checkpoint.streamed import save_streamed
    from usdm_megatron.convert.hf_source import open_source
    from usdm_megatron.convert.import_plan import empty_objects, plan_import, streamed_tensors
    from usdm_megatron.convert.options import ImportOptions

    options = ImportOptions(hf_path=str(hf_directory), save=root)
    plan = dataclasses.replace(plan_import(open_source(hf_directory), options), vocabulary=vocabulary)
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
    return root


def random_rows(
    count: int, seq_length: int, seed: int = 0, vocabulary: Vocabulary = VOCABULARY, fill: float = 0.8
) -> list[list[list[int]]]:
    """Rows of samples (bos … eos) of every kind of token, at most `seq_length` tokens a row."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row: list[list[int]] = []
        while True:
            length = int(rng.integers(2, max(3, seq_length // 2)))
            if sum(map(len, row)) + length > seq_length:
                if sum(map(len, row)) >= fill * seq_length:
                    break
                continue
            body = rng.integers(3, vocabulary.size - 1, size=length - 2)
            row.append([vocabulary.bos_id, *body.tolist(), vocabulary.eos_id])
        rows.append(row)
    return rows


def write_store(
    prefix: Path, rows: Sequence[Sequence[Sequence[int]]], vocabulary: Vocabulary = VOCABULARY
) -> Path:
    """A packed token store of these rows; returns the prefix."""
    from usdm_megatron.data.token_store_writer import TokenStoreWriter

    samples = [sample for row in rows for sample in row]
    with TokenStoreWriter(prefix, vocabulary, row_capacity=max(sum(map(len, row)) for row in rows)) as writer:
        writer.append(
            np.concatenate([np.array(sample) for sample in samples]),
            np.array([len(sample) for sample in samples]),
            np.array([len(row) for row in rows]),
        )
        writer.finish()
    return prefix
