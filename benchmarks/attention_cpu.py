"""Packed attention on CPU: ours beside what torch offers, forward + backward, same inputs, interleaved.

    python benchmarks/attention_cpu.py [--threads 1] [--dtype fp32] [--window 256] [--repeats 7]

Peers: one SDPA call over the row with a block-diagonal (band) mask, SDPA over samples padded to the
longest, and bmm + mask + softmax. Prints medians and the ratio to ours; `--json FILE` writes them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from usdm_megatron.model.attention import segment_attention
from usdm_megatron.model.packed_sequence import PackedSequence


@dataclass(frozen=True)
class Options:
    """What to measure."""

    tokens: int = 2048
    shortest: int = 100
    longest: int = 500
    heads: int = 8
    groups: int = 2
    head_dim: int = 64
    window: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    threads: int = 1
    repeats: int = 7
    json: Path | None = None


def main(options: Options) -> None:
    """Measure and print."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lengths = _lengths(options)
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    shape = (options.tokens, options.heads, options.head_dim)
    q = torch.randn(shape, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(options.tokens, options.groups, options.head_dim, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    row = PackedSequence(segment_lengths=lengths)
    mask = _row_mask(lengths, options.window)
    contestants: dict[str, Callable[[], Tensor]] = {
        "segments (ours)": lambda: segment_attention(q, k, v, row, options.window),
        "padded batch": lambda: _padded(q, k, v, lengths, options.window),
        "block mask": lambda: _masked(q, k, v, mask),
        "bmm + softmax": lambda: _plain(q, k, v, mask),
    }
    expected = contestants["bmm + softmax"]().float()
    for name, run in contestants.items():
        torch.testing.assert_close(
            run().float(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 3e-2, msg=name
        )
    times_ms: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            started_at = time.perf_counter()
            run().float().square().sum().backward()
            times_ms[name].append((time.perf_counter() - started_at) * 1e3)
    ours = statistics.median(times_ms["segments (ours)"])
    print(
        f"{len(lengths)} samples of {min(lengths)}..{max(lengths)} tokens, window {options.window}, "
        f"{options.dtype}"
    )
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    for name, median in medians.items():
        print(f"{name:<18}{median:9.1f} ms  {median / ours:6.2f}x")
    if options.json is not None:
        record = {
            "options": {**asdict(options), "json": str(options.json)},
            "torch": torch.__version__,
            "median_ms": medians,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _lengths(options: Options) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while sum(lengths) < options.tokens:
        lengths.append(int(torch.randint(options.shortest, options.longest + 1, (), generator=generator)))
    lengths[-1] -= sum(lengths) - options.tokens
    return tuple(length for length in lengths if length)


def _row_mask(lengths: tuple[int, ...], window: int | None) -> Tensor:
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(sample))
    distance = position[:, None] - position
    return (sample[:, None] == sample) & (distance >= 0) & (distance < (window or len(sample)))


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)


def _padded(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    longest = max(lengths)
    batches = [
        torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)
        for x in (q, k, v)
    ]
    position = torch.arange(longest)
    distance = position[:, None] - position
    mask = None if window is None else (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(*batches, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return torch.cat([o[:, :n].transpose(0, 1) for o, n in zip(out, lengths, strict=True)])


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    groups = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * q.size(-1) ** -0.5
    return (scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v).transpose(0, 1)


if __name__ == "__main__":
    main(tyro.cli(Options))
