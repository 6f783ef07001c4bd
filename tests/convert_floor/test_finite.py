"""Counting values that are not finite equals torch's own count, for every pattern of bits."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.convert.finite import non_finite_count

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def by_torch(tensor: torch.Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pattern_of_16_bits(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert non_finite_count(every) == by_torch(every) > 0
    for tensor in every[:: 2**8 + 1]:  # alone, too: none hides behind its neighbours
        assert non_finite_count(tensor) == by_torch(tensor)
    assert non_finite_count(every[torch.isfinite(every)]) == 0


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    length=st.sampled_from([1, 5, 2**15 + 3, 2**17, 2**17 + 1, 3 * 2**17 + 7]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from("+-n")), max_size=4),
)
def test_places_and_block_edges(dtype: torch.dtype, length: int, places: list[tuple[float, str]]) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.full((length,), -largest, dtype=dtype)
    tensor[::2] = largest
    values = {"+": float("inf"), "-": float("-inf"), "n": float("nan")}
    for place, kind in places:
        tensor[int(place * length)] = values[kind]
    assert non_finite_count(tensor) == by_torch(tensor)


def test_shapes_and_strides() -> None:
    tensor = torch.zeros(6, 5, 4)
    tensor[1, 2, 3] = float("nan")
    tensor[5, 0, 0] = float("-inf")
    tensor.requires_grad_()
    for view in (
        tensor,
        tensor.permute(2, 0, 1),
        tensor[::2],
        tensor[1:, 1:, 1:],
        tensor[..., 3],
        tensor[1, 2, ::3],
    ):
        assert non_finite_count(view) == by_torch(view)
    assert non_finite_count(torch.zeros(0, 3)) == non_finite_count(torch.tensor(1.0)) == 0
    assert non_finite_count(torch.tensor(float("nan"))) == 1


def test_no_copy_of_the_tensor() -> None:
    tensor = torch.full((4 << 20,), float("nan"), dtype=torch.bfloat16)  # the slow way, everywhere
    tracemalloc.start()
    assert non_finite_count(tensor) == len(tensor)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
