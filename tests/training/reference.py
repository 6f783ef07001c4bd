"""Plain PyTorch on transformers' Mistral: each packed sample alone. Imports nothing of usdm_megatron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

BOS = 1


def load_model(directory: Path) -> Any:
    """fp32, eager attention."""
    from transformers import MistralForCausalLM

    return MistralForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def cut_at_bos(row: Sequence[int]) -> list[list[int]]:
    """The samples of a packed row: each starts at bos."""
    samples: list[list[int]] = []
    for token in row:
        if token == BOS or not samples:
            samples.append([])
        samples[-1].append(int(token))
    return samples


def sample_logits(model: Any, samples: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of the samples of a row, each computed alone, laid end to end."""
    return torch.cat([model(torch.tensor([list(sample)])).logits[0] for sample in samples])


def row_loss(
    model: Any, samples: Sequence[Sequence[int]], train_boundaries: bool
) -> tuple[torch.Tensor, int]:
    """Sum of target losses of one row and their count."""
    logits = sample_logits(model, samples)
    flat = torch.tensor([token for sample in samples for token in sample])
    targets = torch.cat((flat[1:], torch.tensor([-100])))
    if not train_boundaries:
        ends = torch.tensor([len(sample) for sample in samples]).cumsum(0) - 1
        targets[ends] = -100
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), int((targets >= 0).sum())


def train(
    model: Any, rows: Sequence[Sequence[int]], *, steps: int, global_batch: int, micro_batch: int, lr: float
) -> tuple[list[float], list[float]]:
    """The original's training: AdamW, cosine after ceil(3 %) warm-up, mean of micro-batch means.

    Weight decay on everything, no clipping, eos → bos trained. Returns loss and lr of every step.
    """
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * steps), steps)
    losses, rates = [], []
    for step in range(steps):
        batch = rows[step * global_batch : (step + 1) * global_batch]
        micro_batches = [batch[start : start + micro_batch] for start in range(0, len(batch), micro_batch)]
        optimizer.zero_grad()
        loss = 0.0
        for micro in micro_batches:
            parts = [row_loss(model, cut_at_bos(row), train_boundaries=True) for row in micro]
            mean = sum(part for part, _ in parts) / sum(count for _, count in parts) / len(micro_batches)
            mean.backward()
            loss += mean.item()
        losses.append(loss)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return losses, rates
