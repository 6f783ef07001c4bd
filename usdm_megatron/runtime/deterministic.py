"""The same run, the same bits: what `--deterministic-mode` sets, and what in the environment forbids it."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variable → values that are deterministic; the first is set where there is none. Megatron-LM's list
# (`megatron/training/arguments.py`, `deterministic_mode`): cuBLAS with workspaces of its own, reductions that
# always add in one order, Transformer Engine's deterministic kernels alone.
_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def determinism_problems(environ: Mapping[str, str]) -> list[str]:
    """Variables of the environment that ask for what is not deterministic, as sentences."""
    return [
        f"training: --deterministic-mode, and the environment sets {name}={environ[name]}; unset it, or set "
        f"one of {' '.join(values)}"
        for name, values in _VARIABLES.items()
        if name in environ and environ[name] not in values
    ]


def enter_deterministic_mode() -> None:
    """Deterministic kernels and reductions for the rest of this process; before CUDA or NCCL are used."""
    import torch

    for name, values in _VARIABLES.items():
        os.environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
