"""Plain PyTorch on transformers' Mistral: packed samples alone, dialogs padded. Imports nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

BOS = 1
Labelled = tuple[Sequence[int], Sequence[int]]  # ids, and labels that are not shifted


def load_model(directory: Path) -> Any:
    """fp32, eager attention."""
    from transformers import MistralForCausalLM

    return MistralForCausalLM.from_pretrained(directory, attn_implementation="eager").float().eval()


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
    """The original's pre-training, eos → bos trained. Returns loss and lr of every step."""

    def mean_loss(micro: Sequence[Sequence[int]]) -> torch.Tensor:
        parts = [row_loss(model, cut_at_bos(row), train_boundaries=True) for row in micro]
        return sum(part for part, _ in parts) / sum(count for _, count in parts)

    batches = [rows[step * global_batch : (step + 1) * global_batch] for step in range(steps)]
    return _fit(model, batches, mean_loss, micro_batch, lr)


def fine_tune(
    model: Any, batches: Sequence[Sequence[Labelled]], *, micro_batch: int, lr: float, pad: int
) -> tuple[list[float], list[float]]:
    """The original's fine-tuning: dialogs padded to a micro-batch's longest, transformers' own loss.

    Returns loss and lr of every step.
    """

    def mean_loss(micro: Sequence[Labelled]) -> torch.Tensor:
        tokens, labels = padded([ids for ids, _ in micro], pad), padded([own for _, own in micro], -100)
        return model(input_ids=tokens, attention_mask=tokens.ne(pad).long(), labels=labels).loss

    return _fit(model, batches, mean_loss, micro_batch, lr)


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


def _fit(
    model: Any,
    batches: Sequence[Sequence[Any]],
    mean_loss: Callable[[Any], torch.Tensor],
    micro_batch: int,
    lr: float,
) -> tuple[list[float], list[float]]:
    """AdamW, cosine after ceil(3 %) warm-up, mean of micro-batch means, decay on everything, no clipping."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * len(batches)), len(batches))
    losses, rates = [], []
    for batch in batches:
        micro_batches = [batch[start : start + micro_batch] for start in range(0, len(batch), micro_batch)]
        optimizer.zero_grad()
        loss = 0.0
        for micro in micro_batches:
            mean = mean_loss(micro) / len(micro_batches)
            mean.backward()
            loss += mean.item()
        losses.append(loss)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return losses, rates
