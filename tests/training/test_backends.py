"""Attention backends in 16 bit: kernels against float64, a whole step against transformers in fp32 and bf16.

te and flash need CUDA and their package (`scripts/gpu_check.sh`). torch runs everywhere, on the CPU by
segments, and shows there that the comparisons can be made. Bounds are those of flash-attention's tests: at
most twice the error of a plain computation in the same precision.
"""

from __future__ import annotations

import importlib.util
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model_floor.test_attention import ROWS, brute_force
from tests.ranks import run_ranks
from tests.training import jobs, reference
from tests.training.jobs import Layout
from tests.training.test_model_parity import OPTIONS, hf_tensors, reference_gradients
from tests.training.test_model_parity import ROWS as PARITY_ROWS

HEADS, GROUPS, HEAD_DIM = 4, 2, 64
FLOOR = 1e-5  # where the plain computation is exact, as in segments of one token


def needing(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.gpu, pytest.mark.skipif(missing, reason=f"{package} is not installed")


BACKENDS = [
    "torch",
    pytest.param("te", marks=needing("transformer_engine")),
    pytest.param("flash", marks=needing("flash_attn")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel(backend: str) -> None:
    """Outputs and gradients of every row of the CPU kernel's test, windows and their edges among them."""
    (found,) = run_ranks(1, attend, backend, ROWS)
    for (lengths, window), tensors in zip(ROWS, found, strict=True):
        inputs = [tensor.float() for tensor in tensors["inputs"]]
        exact = outputs_and_gradients(inputs, tensors["weights"], lengths, window, torch.float64)
        plain = outputs_and_gradients(inputs, tensors["weights"], lengths, window, torch.bfloat16)
        for name, ours in tensors["found"].items():
            error, plain_error = (
                (one - exact[name]).abs().max().item() for one in (ours.double(), plain[name])
            )
            assert error <= 2 * plain_error + FLOOR, (backend, lengths, window, name)


def outputs_and_gradients(
    inputs: list[torch.Tensor],
    weights: torch.Tensor,
    lengths: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    row = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    output = brute_force(*row, lengths, window)
    (output * weights.to(dtype)).sum().backward()
    values = {"output": output.detach(), **{name: x.grad for name, x in zip("qkv", row, strict=True)}}
    return {name: value.double() for name, value in values.items() if value is not None}


def attend(environment: Any, store: Any, backend: Any, rows: Any) -> list[dict[str, Any]]:
    """The backend's module on this rank's device, built as the layer spec builds it."""
    from megatron.core.transformer.enums import AttnMaskType

    from tests.tiny import MODEL
    from usdm_megatron.architecture import HFArchitecture
    from usdm_megatron.layout import ParallelLayout
    from usdm_megatron.model.architecture import build_transformer_config
    from usdm_megatron.model.attention import packed_core_attention, resolve_backend
    from usdm_megatron.model.packed_sequence import PackedSequence
    from usdm_megatron.parallel_config import ParallelConfig
    from usdm_megatron.runtime.process_groups import open_process_groups

    shape = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD_DIM}
    resolved = resolve_backend(backend, torch.bfloat16)
    assert resolved == backend
    found = []
    with open_process_groups(
        ParallelLayout(1), environment, timeout=timedelta(seconds=100), store=store
    ) as groups:
        for lengths, window in rows:
            model = HFArchitecture.from_hf_config(MODEL | shape | {"sliding_window": window})
            config = build_transformer_config(model, ParallelConfig(), dtype=torch.bfloat16)
            module = packed_core_attention(resolved)(
                config, 1, AttnMaskType.causal, "self", pg_collection=groups.collection
            )
            generator = torch.Generator().manual_seed(sum(lengths))
            shapes = [(sum(lengths), count, HEAD_DIM) for count in (HEADS, GROUPS, GROUPS, HEADS)]
            *inputs, weights = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
            q, k, v = (tensor.to(groups.device).requires_grad_() for tensor in inputs)
            row = PackedSequence.of_lengths(lengths, groups.device)
            output = module.attend(q, k, v, row, window).reshape(q.shape)
            (output * weights.to(groups.device)).sum().backward()
            values = {"output": output.detach(), "q": q.grad, "k": k.grad, "v": v.grad}
            cpu = {name: value.cpu() for name, value in values.items() if value is not None}
            found.append({"inputs": inputs, "weights": weights, "found": cpu})
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers(backend: str, tiny_model: Any, tmp_path: Path) -> None:
    """Loss and gradients of the whole model in bf16, against transformers' in fp32 and in bf16."""
    options = OPTIONS | {"model": {"core_attention": backend}, "training": {"bf16": True}}
    (result,) = run_ranks(1, jobs.gradients, Layout(), tiny_model.release, tmp_path, PARITY_ROWS, options)
    loss, exact = reference_gradients(tiny_model.hf, False)
    plain_loss, plain = bf16_gradients(tiny_model.hf)
    assert abs(result["loss"] - loss) <= 2 * abs(plain_loss - loss) + 1e-3 * loss
    ours = hf_tensors(tmp_path / "iter_0000001")
    for name, gradient in exact.items():
        error, plain_error = ((one[name].float() - gradient).norm() for one in (ours, plain))
        assert error <= 2 * plain_error, (name, error, plain_error, gradient.norm())


def bf16_gradients(hf: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = reference.load_model(hf).bfloat16()
    parts = [reference.row_loss(model, row, False) for row in PARITY_ROWS]
    loss = sum(part.float() for part, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}
