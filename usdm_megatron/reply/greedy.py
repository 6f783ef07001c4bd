"""Greedy decoding of a transformers model, a batch of prompts at a time, with its key-value cache.

Letters: B = rows that still write, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from usdm_megatron.architecture import family_of
from usdm_megatron.errors import DataError
from usdm_megatron.file_reading import read_json_object
from usdm_megatron.reply.inference import Continuation, StepRule
from usdm_megatron.reply.model_directory import ModelDirectory


def load_model(directory: ModelDirectory) -> Any:
    """transformers' model for evaluation: bf16 on CUDA, else fp32; from safetensors, never remote code.

    Missing tensors would be left random: callers check the files first (`convert/hf_source.py`).
    """
    import transformers

    family = family_of(read_json_object(directory.path / "config.json"))
    transformers.utils.logging.disable_progress_bar()
    model_class = getattr(transformers, family.transformers_class)
    model = model_class.from_pretrained(directory.path, use_safetensors=True, local_files_only=True)
    on_cuda = torch.cuda.is_available()
    return model.to("cuda" if on_cuda else "cpu", torch.bfloat16 if on_cuda else torch.float32).eval()


class GreedyDecoder:
    """Continues prompts with the likeliest token that a rule allows, as `generate` does without sampling.

    A row ends at the rule's stop token, after `max_new_tokens`, or when it is `context_tokens` long.
    `load` gives the model when the first prompt comes: wrong input is found before it is loaded.
    """

    def __init__(
        self, load: Callable[[], Any], context_tokens: int, max_new_tokens: int | None = None
    ) -> None:
        self._load = load
        self._context_tokens = context_tokens
        self._max_new_tokens = context_tokens if max_new_tokens is None else max_new_tokens

    @cached_property
    def _model(self) -> Any:
        return self._load()

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[np.ndarray], rule: StepRule) -> list[Continuation]:
        """One continuation a prompt (ids `[T]`), in order; `DataError` when logits are not finite."""
        rooms = [min(self._max_new_tokens, self._context_tokens - len(prompt)) for prompt in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        rows = [row for row, room in enumerate(rooms) if room > 0]
        if rows:
            tokens_BT, attended_BT = self._left_padded([prompts[row] for row in rows])
            positions_BT = (attended_BT.cumsum(dim=1) - 1).clamp(min=0)
            banned_V = self._banned(rule)
        cache: dict[str, Any] = {}
        while rows:
            output = self._model(
                input_ids=tokens_BT,
                attention_mask=attended_BT,
                position_ids=positions_BT,
                use_cache=True,
                logits_to_keep=1,  # all of a long prompt's would take gigabytes
                **cache,
            )
            name = "cache" if hasattr(output, "cache") else "past_key_values"  # before transformers 5.24
            cache = {name: getattr(output, name)}
            best_B, chosen_B = output.logits[:, -1].masked_fill(banned_V, -torch.inf).max(dim=-1)
            if not bool(best_B.isfinite().all()):  # NaN is the largest of a row that has one
                raise DataError(
                    f"the model's logits are NaN or infinite, in {best_B.dtype}; its weights are damaged, or "
                    "training diverged: export again, from a checkpoint whose loss is finite"
                )
            going = []  # places in the batch
            for place, (row, token) in enumerate(zip(rows, chosen_B.tolist(), strict=True)):
                stopped[row] = token == rule.stop_id
                if stopped[row]:
                    continue
                written[row].append(token)
                if len(written[row]) < rooms[row]:
                    going.append(place)
            if len(going) < len(rows):  # rows that ended cost nothing from here on
                kept = torch.tensor(going, dtype=torch.long, device=chosen_B.device)
                rows = [rows[place] for place in going]
                chosen_B, attended_BT, positions_BT = chosen_B[kept], attended_BT[kept], positions_BT[kept]
                cache[name].batch_select_indices(kept)
            tokens_BT = chosen_B[:, None]
            attended_BT = torch.nn.functional.pad(attended_BT, (0, 1), value=1)
            positions_BT = positions_BT[:, -1:] + 1
        return [
            Continuation(np.array(ids, dtype=np.int32), end)
            for ids, end in zip(written, stopped, strict=True)
        ]

    def _left_padded(self, prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 `[B, T]`; what stands in the padding is never seen."""
        longest = max(map(len, prompts))
        tokens = np.zeros((len(prompts), longest), dtype=np.int64)
        attended = np.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
            attended[row, longest - len(prompt) :] = 1
        device = self._model.device
        return torch.from_numpy(tokens).to(device), torch.from_numpy(attended).to(device)

    def _banned(self, rule: StepRule) -> Tensor:
        """bool `[V]`."""
        banned = torch.zeros(self._model.config.vocab_size, dtype=torch.bool)
        banned[rule.banned.start : rule.banned.stop] = True
        banned[rule.stop_id] = False
        return banned.to(self._model.device)
