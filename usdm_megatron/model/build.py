"""Build this rank's part of the model: one `GPTModel` per pipeline chunk."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.func import functional_call

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import CoreAttention
from usdm_megatron.errors import ConfigError
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.model.layer_spec import build_block_spec
from usdm_megatron.model.lora.new_rows import NewRows
from usdm_megatron.model.lora.state import freeze_base, start_adapters
from usdm_megatron.model.loss import packed_cross_entropy
from usdm_megatron.runtime.process_groups import ProcessGroups
from usdm_megatron.vocab import Vocabulary


class PackedGPTModel(GPTModel):
    """Core's `GPTModel` whose loss leaves the padding of the vocabulary outside the softmax.

    RoPE is applied by the packed core attention, so the model itself has no position embedding.
    """

    def __init__(self, *args: Any, vocabulary_size: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.vocabulary_size = vocabulary_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token loss `[1, S]` from labels `[1, S]` and logits `[S, 1, V]`."""
        group = self.pg_collection.tp
        loss_S = packed_cross_entropy(
            logits.squeeze(1),
            labels.squeeze(0),
            vocabulary_size=self.vocabulary_size,
            tp_rank=group.rank(),
            group=group,
        )
        return loss_S.unsqueeze(0)


class LoraGPTModel(PackedGPTModel):
    """The model with its base frozen: adapters train, and the rows of `new_ids` of its embeddings.

    Those rows are `new_embedding_rows` and, unless embeddings are tied, `new_output_rows`.
    """

    def __init__(self, *args: Any, new_ids: range | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if new_ids is None:
            return
        tied = self.share_embeddings_and_output_weights
        if self.pre_process or (self.post_process and tied):
            weight = self.shared_embedding_or_output_weight()
            self.new_embedding_rows = self._new_rows(weight, new_ids, is_copy=not self.pre_process)
        if self.post_process:
            if not tied:
                self.new_output_rows = self._new_rows(self.output_layer.weight, new_ids)
            rows = self.new_embedding_rows if tied else self.new_output_rows
            self.output_layer.register_forward_pre_hook(partial(_substitute, rows), with_kwargs=True)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As core's; embeddings are looked up here, with the trained rows in their place."""
        if self.pre_process and decoder_input is None:
            decoder_input = self._embed(input_ids, position_ids)
        return super().forward(input_ids, position_ids, attention_mask, decoder_input, **kwargs)

    def start_new_rows(self) -> None:
        """New rows take the base's values; call it when the base was loaded and no adapter is."""
        if hasattr(self, "new_embedding_rows"):
            self.new_embedding_rows.start(self.shared_embedding_or_output_weight())
        if hasattr(self, "new_output_rows"):
            self.new_output_rows.start(self.output_layer.weight)

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if not hasattr(self, "new_embedding_rows"):
            # A recomputed layer whose input needs no gradient gives none to its adapters, without a word.
            return self.embedding(input_ids, position_ids).requires_grad_(torch.is_grad_enabled())
        weight = self.new_embedding_rows(self.embedding.word_embeddings.weight)
        return functional_call(self.embedding, {"word_embeddings.weight": weight}, (input_ids, position_ids))

    def _new_rows(self, weight: Tensor, ids: range, *, is_copy: bool = False) -> NewRows:
        return NewRows(weight, self.pg_collection.tp.rank() * weight.size(0), ids, is_copy=is_copy)


def _substitute(
    rows: NewRows, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the output layer: the weight that it is given, or has, with the trained rows."""
    given = kwargs.get("weight")
    return args, {**kwargs, "weight": rows(layer.weight if given is None else given)}


def build_model_chunks(
    config: TransformerConfig,
    architecture: HFArchitecture,
    vocabulary: Vocabulary,
    groups: ProcessGroups,
    backend: CoreAttention,
    lora: LoraSpec | None = None,
    seed: int = 0,
) -> list[PackedGPTModel]:
    """This rank's chunks (one, or `vpp` of an interleaved pipeline) on its device, uninitialised.

    With `lora` the base is frozen and adapters have their initial values, drawn from `seed`. Raises
    `ConfigError` when new embeddings are to train and the vocabulary has no new ids.
    """
    new_ids = _new_ids(vocabulary) if lora is not None and lora.train_new_embeddings else None
    vpp = groups.layout.vpp
    chunks = []
    for chunk in range(vpp):
        stage = chunk if vpp > 1 else None
        first = groups.is_first_stage and chunk == 0
        last = groups.is_last_stage and chunk == vpp - 1
        layers_here = get_num_layers_to_build(config, vp_stage=stage, pp_rank=groups.coordinates.pp)
        model_class = PackedGPTModel if lora is None else partial(LoraGPTModel, new_ids=new_ids)
        model = model_class(
            config=config,
            transformer_layer_spec=build_block_spec(config, backend, layers_here, lora),
            vocab_size=vocabulary.padded_size,
            vocabulary_size=vocabulary.size,
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.tied,
            pg_collection=groups.collection,
            vp_stage=stage,
        )
        _mark_sharded_weights(model)
        if lora is not None:
            freeze_base(model)
            start_adapters(model, seed)
        chunks.append(model.to(groups.device))
    return chunks


def _mark_sharded_weights(model: torch.nn.Module) -> None:
    """Say which weights are shards: the gradient norm counts all others on one tensor parallel rank only.

    Core does it while it initialises (`tensor_parallel/layers.py:137`), which weights that are loaded skip.
    """
    sharded_axis = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        axis = sharded_axis.get(type(module))  # an adapted layer's weight is frozen: nobody counts it
        if axis is not None and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=axis, stride=1)


def _new_ids(vocabulary: Vocabulary) -> range:
    if not vocabulary.has_speech:
        raise ConfigError(
            f"lora: new embeddings are to train, and this vocabulary of {vocabulary.size} ids has no new "
            "ones; extend it when the model is converted, or drop --train-new-embeddings"
        )
    return range(vocabulary.text_size, vocabulary.size)


def parameter_count(chunks: list[PackedGPTModel], *, trainable: bool = False) -> int:
    """Parameters on this rank; with `trainable`, those alone that get a gradient."""
    parameters = (parameter for chunk in chunks for parameter in chunk.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trainable)


def weight_dtype(bf16: bool) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if bf16 else torch.float32
