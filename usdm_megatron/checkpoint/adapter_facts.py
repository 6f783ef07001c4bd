"""What a checkpoint of an adapter says about itself: how it adapts, and which base it belongs to.

adapter.json   `{"base": {"directory", "sha256"}, "lora": {"r", "alpha", "dropout", "targets", …}}`;
               a checkpoint of whole weights has none

A base is known by the sha256 of its `integrity.json`, which covers every file of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from usdm_megatron.checkpoint.facts import write_json
from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE, verify_integrity
from usdm_megatron.checkpoint.resolve import RELEASE, directory_name, list_steps
from usdm_megatron.errors import CheckpointError, ConfigError
from usdm_megatron.file_reading import file_sha256
from usdm_megatron.lora_spec import TARGETS, LoraSpec

ADAPTER_FILE = "adapter.json"
_MOST_HASHES_SAID = 3


@dataclass(frozen=True)
class AdapterFacts:
    """How an adapter adapts, and the checkpoint that it was trained over."""

    spec: LoraSpec
    base_directory: str  # where the base lay
    base_sha256: str

    @classmethod
    def over(cls, base: Path, spec: LoraSpec) -> AdapterFacts:
        """The facts of a new adapter over the (verified) checkpoint directory `base`.

        Raises `CheckpointError` when `base` is an adapter itself.
        """
        if (base / ADAPTER_FILE).exists():
            raise CheckpointError(
                f"{base} is an adapter, and an adapter's base is a whole model; export it with --merge-lora, "
                "import the result, and start from that"
            )
        return cls(spec, str(base.resolve()), file_sha256(base / INTEGRITY_FILE))

    def write(self, directory: Path) -> None:
        """Write `adapter.json` into a checkpoint directory that is being made."""
        targets = [target for target in TARGETS if target in self.spec.targets]
        record = {
            "base": {"directory": self.base_directory, "sha256": self.base_sha256},
            "lora": {**asdict(self.spec), "targets": targets},
        }
        write_json(directory / ADAPTER_FILE, record)


def read_adapter_facts(directory: Path) -> AdapterFacts | None:
    """The facts of the adapter in a checkpoint directory; None when it holds whole weights.

    Raises `CheckpointError` when `adapter.json` is malformed.
    """
    path = directory / ADAPTER_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        base, lora = dict(record["base"]), dict(record["lora"])
        spec = LoraSpec(**{**lora, "targets": frozenset(lora["targets"])})
        return AdapterFacts(spec, _string(base["directory"]), _string(base["sha256"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is malformed: {error}") from error


def resolve_base(facts: AdapterFacts, override: Path | None = None) -> Path:
    """The verified checkpoint directory of the base: where it lay, or in `override`.

    `override` (`--pretrained-checkpoint`) is a converted model, a run, or one checkpoint directory; of
    several checkpoints the one with the recorded hash is meant. Reads every byte: in a multi-rank
    program call it on rank 0. Raises `CheckpointError` when there is no such base, or it is damaged.
    """
    recorded = Path(facts.base_directory)
    remedy = "say where the base is now with --pretrained-checkpoint"
    if override is None:
        candidates = [recorded]
        where = f"the adapter's base {recorded}"
        if not (recorded / INTEGRITY_FILE).is_file():
            raise CheckpointError(f"{where} is not there (any more); {remedy}")
    else:
        candidates = list(_checkpoints_in(override))
        where, remedy = f"--pretrained-checkpoint {override}", f"the adapter was trained over {recorded}"
        if not candidates:
            raise CheckpointError(f"{where} holds no checkpoint; {remedy}")
    hashes = {path: file_sha256(path / INTEGRITY_FILE) for path in candidates}
    for path, digest in hashes.items():
        if digest == facts.base_sha256:
            if problems := verify_integrity(path):
                raise CheckpointError(*problems)
            return path
    found = ", ".join(f"{digest[:12]}…" for digest in list(hashes.values())[:_MOST_HASHES_SAID])
    raise CheckpointError(
        f"{where} is another model than the adapter's base: the sha256 of its {INTEGRITY_FILE} is {found}, "
        f"recorded is {facts.base_sha256[:12]}…; {remedy}"
    )


def _checkpoints_in(root: Path) -> Iterator[Path]:
    """The checkpoint directories that `root` means, newest first."""
    names = [root, *(root / directory_name(step) for step in reversed(list_steps(root))), root / RELEASE]
    return (path for path in names if (path / INTEGRITY_FILE).is_file())


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} must be a string")
    return value
