"""Embedding rows of tokens that the source model does not have.

A row's values depend on the seed, the token id and the tensor alone: not on the number of new
tokens, the type of the weights, the order of conversion, or any parallel layout.
"""

from __future__ import annotations

import numpy as np
import torch

# A number for each tensor that has rows by token; part of the seed, so never renumber.
_TENSOR_NUMBERS = {"model.embed_tokens.weight": 0, "lm_head.weight": 1}


def new_rows(hf_name: str, token_ids: range, hidden: int, std: float, seed: int) -> torch.Tensor:
    """Rows drawn from N(0, std²), float32 `[len(token_ids), hidden]`."""
    rows = np.empty((len(token_ids), hidden), dtype=np.float32)
    tensor_number = _TENSOR_NUMBERS[hf_name]
    for row, token_id in zip(rows, token_ids, strict=True):
        generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([seed, tensor_number, token_id]))
        )
        generator.standard_normal(out=row, dtype=np.float32)
    rows *= np.float32(std)
    return torch.from_numpy(rows)
