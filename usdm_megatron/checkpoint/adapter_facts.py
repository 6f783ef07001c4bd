"""What a checkpoint of an adapter says about itself: how it adapts, and which base it belongs to.

adapter.json   `{"base": {"directory", "sha256", "source_sha256"}, "lora": {"r", "alpha", "dropout", …}}`;
               a checkpoint of whole weights has none

A base is known by the sha256 of its `integrity.json`, which covers every file of it, and one that was
converted by what it was converted from, too (`BaseIdentity`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from usdm_megatron.checkpoint.facts import read_facts, write_json
from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE
from usdm_megatron.checkpoint.resolve import RELEASE, NamedCheckpoint, directory_name, list_steps
from usdm_megatron.errors import CheckpointError, ConfigError
from usdm_megatron.file_reading import file_sha256
from usdm_megatron.lora_spec import TARGETS, LoraSpec

ADAPTER_FILE = "adapter.json"
_MOST_HASHES_SAID = 3
_SAY_WHERE = "say where the base is now with --pretrained-checkpoint"


@dataclass(frozen=True)
class BaseIdentity:
    """What tells a base from any other model.

    `sha256` is of its `integrity.json`, `source_sha256` of which files it was converted from, and how:
    another `--workers`, or another version of this package, writes the same weights as other files. None for
    a step of a run, which is known by its own files alone.
    """

    sha256: str
    source_sha256: str | None = None

    @classmethod
    def of(cls, directory: Path) -> BaseIdentity:
        """The identity of a (verified) checkpoint directory."""
        facts = read_facts(directory)
        source = {name: facts.provenance.get(name) for name in ("files", "options")}
        record = json.dumps(source, sort_keys=True).encode()
        is_known = facts.kind == "converted" and bool(source["files"])
        return cls(
            file_sha256(directory / INTEGRITY_FILE), hashlib.sha256(record).hexdigest() if is_known else None
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> BaseIdentity:
        """What `to_record` gave; raises `KeyError` or `TypeError` for anything else."""
        source = record.get("source_sha256")
        return cls(_string(record["sha256"]), None if source is None else _string(source))

    def to_record(self) -> dict[str, str | None]:
        return asdict(self)

    def is_of(self, other: BaseIdentity) -> bool:
        """Whether both are of the same weights."""
        same_source = self.source_sha256 is not None and self.source_sha256 == other.source_sha256
        return self.sha256 == other.sha256 or same_source


@dataclass(frozen=True)
class AdapterFacts:
    """How an adapter adapts, and the checkpoint that it was trained over."""

    spec: LoraSpec
    base_directory: str  # where the base lay
    base: BaseIdentity

    @property
    def base_sha256(self) -> str:
        return self.base.sha256

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
        return cls(spec, str(base.resolve()), BaseIdentity.of(base))

    def write(self, directory: Path) -> None:
        """Write `adapter.json` into a checkpoint directory that is being made."""
        targets = [target for target in TARGETS if target in self.spec.targets]
        record = {
            "base": {"directory": self.base_directory, **self.base.to_record()},
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
        return AdapterFacts(spec, _string(base["directory"]), BaseIdentity.from_record(base))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise CheckpointError(f"{path} is malformed: {error}") from error


def resolve_base(facts: AdapterFacts, override: Path | None = None, *, remedy: str = _SAY_WHERE) -> Path:
    """The directory of the base, as `find_base` finds it, verified.

    Reads every byte: in a multi-rank program call it on rank 0. Raises `CheckpointError` when there is no
    such base, or it is damaged.
    """
    base = find_base(facts, override, remedy=remedy)
    base.verify()
    return base.path


def find_base(
    facts: AdapterFacts, override: Path | None = None, *, remedy: str = _SAY_WHERE
) -> NamedCheckpoint:
    """The checkpoint of the base, not verified yet: where it lay, or in `override`.

    `override` (`--pretrained-checkpoint`) is a converted model, a run, or one checkpoint directory; of
    several checkpoints the one with the recorded hash is meant, or else the newest one of the same weights.
    `remedy` is what to do about a base that is not where it lay. Raises `CheckpointError` when there is no
    such base.
    """
    recorded = Path(facts.base_directory)
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
    exact = [path for path, digest in hashes.items() if digest == facts.base.sha256]
    if same := exact or [path for path in candidates if BaseIdentity.of(path).is_of(facts.base)]:
        return NamedCheckpoint(same[0])
    found = ", ".join(f"{digest[:12]}…" for digest in list(hashes.values())[:_MOST_HASHES_SAID])
    raise CheckpointError(
        f"{where} is another model than the adapter's base: the sha256 of its {INTEGRITY_FILE} is {found}, "
        f"recorded is {facts.base.sha256[:12]}…, nor was it converted from the same files; {remedy}"
    )


def _checkpoints_in(root: Path) -> Iterator[Path]:
    """The checkpoint directories that `root` means, newest first."""
    names = [root, *(root / directory_name(step) for step in reversed(list_steps(root))), root / RELEASE]
    return (path for path in names if (path / INTEGRITY_FILE).is_file())


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} must be a string")
    return value
