"""`common.pt` and `metadata.json`: what a torch_dist checkpoint holds beside its tensors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from usdm_megatron.errors import CheckpointError

COMMON_FILE = "common.pt"
FORMAT_FILE = "metadata.json"
BACKEND, BACKEND_VERSION = "torch_dist", 1


def write_common(directory: Path, common: dict[str, Any]) -> None:
    """Write `common.pt`; what nobody could load again is refused now."""
    import torch

    torch.save(common, directory / COMMON_FILE)
    read_common(directory)


def write_format(directory: Path) -> None:
    """Write the four keys by which megatron-core recognises the format (`dist_checkpointing/core.py`)."""
    record = {
        "sharded_backend": BACKEND,
        "sharded_backend_version": BACKEND_VERSION,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / FORMAT_FILE).write_text(json.dumps(record), encoding="utf-8")


def read_common(directory: Path) -> dict[str, Any]:
    """The contents of `common.pt`: plain values, tensors and `argparse.Namespace`, nothing else."""
    import torch

    path = directory / COMMON_FILE
    try:
        with namespace_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types on bytes that are no checkpoint
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def namespace_allowed() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` make the one class that Megatron-LM keeps in `common.pt`.

    megatron.core allows it for good when it is imported; torch's context manager would take that back.
    """
    import torch

    if argparse.Namespace in torch.serialization.get_safe_globals():
        yield
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        yield
