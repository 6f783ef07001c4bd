"""A tiny Mistral with random weights and the real tokenizer, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from usdm_megatron.demo.settings import DEMO, DemoSettings
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.vocab import USDM_VOCABULARY


def write_demo_model(directory: Path, settings: DemoSettings = DEMO) -> Path:
    """Write config, weights (safetensors, fp32) and tokenizer; the same settings write the same weights."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=USDM_VOCABULARY.text_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.query_groups,
        head_dim=settings.head_dim,
        sliding_window=settings.sliding_window,
        max_position_embeddings=settings.max_positions,
        rms_norm_eps=settings.rms_norm_eps,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=USDM_VOCABULARY.bos_id,
        eos_token_id=USDM_VOCABULARY.eos_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = MistralForCausalLM(config)
    model.save_pretrained(directory)
    write_mistral_tokenizer(directory)
    return directory
