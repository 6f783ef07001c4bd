"""`.metadata` of a torch_dist checkpoint, unpickled without running what a stranger put into it.

torch's own reader calls `pickle.load`. A hash does not help: whoever writes the file writes the hash.
"""

from __future__ import annotations

import pickle  # nosec B403 - restricted below to the names of a table
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from usdm_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA_FILE = ".metadata"
# All that `.metadata` refers to (torch 2.13.0: `checkpoint/metadata.py`, `checkpoint/filesystem.py`).
# None of them does more than keep what it is given, or look a constant up.
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def read_metadata(directory: Path) -> Metadata:
    """What a checkpoint directory holds where; raises `CheckpointError` for anything else than that."""
    from torch.distributed.checkpoint.metadata import Metadata

    path = directory / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _unpickler()(file).load()
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} is no torch_dist checkpoint: {METADATA_FILE} is missing"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(*(f"{path} {problem}" for problem in error.problems)) from None
    except Exception as error:  # unpickling damaged bytes raises almost anything
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} cannot be read: it holds no metadata of torch's")
    for place in (metadata.storage_data or {}).values():
        name = place.relative_path
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".distcp"):
            raise CheckpointError(f"{path} names {name!r}; only .distcp files beside it are read")
    return metadata


def _unpickler() -> type[pickle.Unpickler]:
    import torch

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if is_type or name in _ALLOWED.get(module, ()):
                return super().find_class(module, name)
            _refuse(module, name)

    return Restricted


def _refuse(module: str, name: str) -> NoReturn:
    raise CheckpointError(
        f"refers to {module}.{name}, which no checkpoint needs and which could run code: it was not written "
        "by this package. Where you trust it, open it with what wrote it, save that in Hugging Face format, "
        "and import the result"
    )
