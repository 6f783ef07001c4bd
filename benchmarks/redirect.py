"""What the CPU redirect costs: one small operator with and without it, interleaved.

python benchmarks/redirect.py [--calls 200000] [--repeats 5]
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import tyro

from usdm_megatron.runtime.cpu import _CudaMeansCpu


@dataclass(frozen=True)
class Options:
    """How often to call."""

    calls: int = 200_000
    repeats: int = 5


def main(options: Options) -> None:
    """Measure and print medians."""
    torch.set_num_threads(1)
    plain_us, redirected_us = [], []
    for _ in range(options.repeats):
        plain_us.append(_time_us(options.calls))
        with _CudaMeansCpu():
            redirected_us.append(_time_us(options.calls))
    plain, redirected = statistics.median(plain_us), statistics.median(redirected_us)
    print(f"torch.add on 8 elements: {plain:.2f} µs, redirected {redirected:.2f} µs")


def _time_us(calls: int) -> float:
    x = torch.randn(8)
    started_at = time.perf_counter()
    for _ in range(calls):
        torch.add(x, x)
    return (time.perf_counter() - started_at) / calls * 1e6


if __name__ == "__main__":
    main(tyro.cli(Options))
