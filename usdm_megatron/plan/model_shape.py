"""The model that is planned for: a preset, a checkpoint or run, or a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.errors import CheckpointError, ConfigError
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

PRESETS: dict[str, dict[str, Any]] = {
    "mistral-7b": {  # mistralai/Mistral-7B-v0.1, config.json
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
}


@dataclass(frozen=True)
class ModelShape:
    """What decides a model's size and work: its architecture, and the vocabulary that it trains with."""

    name: str
    architecture: HFArchitecture
    vocabulary: Vocabulary

    @property
    def attention_weights(self) -> int:
        """Weights of a layer's projections to and from attention."""
        model = self.architecture
        return model.hidden * model.head_dim * 2 * (model.heads + model.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Weights of a layer's gate, up and down projections."""
        return 3 * self.architecture.hidden * self.architecture.ffn

    @property
    def layer_parameters(self) -> int:
        """Parameters of a layer, both norms included."""
        return self.attention_weights + self.mlp_weights + 2 * self.architecture.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the Hugging Face model, without the padding of the vocabulary."""
        model = self.architecture
        embeddings = (1 if model.tied else 2) * self.vocabulary.size * model.hidden
        return model.layers * self.layer_parameters + embeddings + model.hidden


def find_model(model: str) -> ModelShape:
    """The shape of `model`: a preset, a checkpoint or run (its own vocabulary), or a Hugging Face directory.

    Presets and Hugging Face directories that know no speech yet are planned with USDM's extension, as
    `convert import --extend-vocab usdm` makes it. Nothing but JSON and tokenizer files is read. Raises
    `ConfigError` naming the presets where `model` is none of these.
    """
    if model in PRESETS:
        return _extended(
            model, PRESETS[model], Vocabulary(text_size=PRESETS[model]["vocab_size"], unit_count=0)
        )
    root = Path(model)
    if (checkpoint := _checkpoint_directory(root)) is not None:
        from usdm_megatron.checkpoint.facts import read_facts

        facts = read_facts(checkpoint)
        return ModelShape(model, facts.architecture, facts.vocabulary)
    if (root / "config.json").is_file():
        return _of_hugging_face(root)
    raise ConfigError(
        f"plan: --model {model} is no preset ({', '.join(PRESETS)}), no checkpoint or run, and no Hugging "
        "Face directory (with config.json); a model of the hub is downloaded first"
    )


def _checkpoint_directory(root: Path) -> Path | None:
    """The checkpoint that `root` means, by its tracker or the largest step; its weights are not read."""
    from usdm_megatron.checkpoint.facts import HF_CONFIG_FILE
    from usdm_megatron.checkpoint.resolve import RELEASE, directory_name, list_steps, read_tracker

    if (root / HF_CONFIG_FILE).is_file():
        return root
    if (newest := read_tracker(root)) is not None:
        directory = root / directory_name(newest)
        if not directory.is_dir():
            raise CheckpointError(f"{root}: its newest checkpoint {directory.name} is missing")
        return directory
    if steps := list_steps(root):
        return root / directory_name(steps[-1])
    return root / RELEASE if (root / RELEASE / HF_CONFIG_FILE).is_file() else None


def _of_hugging_face(directory: Path) -> ModelShape:
    from usdm_megatron.file_reading import read_json_object
    from usdm_megatron.tokenizer.files import has_tokenizer, read_vocabulary

    config = read_json_object(directory / "config.json")
    size = HFArchitecture.from_hf_config(config).vocab_size
    if has_tokenizer(directory):
        vocabulary = read_vocabulary(directory, size, USDM_VOCABULARY.bos_id, USDM_VOCABULARY.eos_id)
    elif size == USDM_VOCABULARY.size:
        vocabulary = USDM_VOCABULARY
    else:
        vocabulary = Vocabulary(text_size=size, unit_count=0)
    return _extended(str(directory), config, vocabulary)


def _extended(name: str, config: dict[str, Any], vocabulary: Vocabulary) -> ModelShape:
    if not vocabulary.has_speech:
        vocabulary = replace(vocabulary, unit_count=USDM_VOCABULARY.unit_count)
    return ModelShape(
        name, HFArchitecture.from_hf_config({**config, "vocab_size": vocabulary.size}), vocabulary
    )
