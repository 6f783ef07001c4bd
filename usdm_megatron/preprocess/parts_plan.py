"""What a directory of parts is made of: enough to finish it without the command that began it.

P.parts/plan.json          `PartsPlan`
P.parts/part-00012.*       part 12 (`part_files.py`)
P.parts/sources-00003.json sha256 of input files
P.parts/published          all stores are there; what is left of the directory may go
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from usdm_megatron.data.file_writing import reported
from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.preprocess.packing import PackingMethod
from usdm_megatron.preprocess.rows import RowSource
from usdm_megatron.preprocess.samples import SampleSource
from usdm_megatron.vocab import Vocabulary

FORMAT_VERSION = 1
PLAN_NAME = "plan.json"
PUBLISHED_NAME = "published"
# How often an id may come: once (utterances, dialogs), or as often as it likes (ids that are made from the
# content).
IdRule = Literal["once", "any"]
_LONGEST_NAME = 200  # `_report.json.{32 digits}.tmp` and `_train_loss_mask.targets.tmp` come behind it
SINGLE_FILES = 1000
FILES_TOGETHER = 4096


@dataclass(frozen=True)
class Shard:
    """`--shard index/count` of the work, counted from 0; by default all of it."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"--shard is {self.index}/{self.count}; of n shards the first is 0/n and the last (n-1)/n"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ConfigError(f"--shard is {text!r}; it takes i/n, for example 0/16 to 15/16")
        return cls(int(index), int(count))

    def numbers(self, total: int) -> range:
        """Which of `total` pieces of work are its own: neighbours, for who reads a file forwards."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)


@dataclass(frozen=True)
class MergeOptions:
    """How samples become rows; `split` is the share of utterances in (train, test), None: one store."""

    packing: PackingMethod = "best-fit"
    split: tuple[float, float] | None = None
    seed: int = 42
    strict: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}, the least is 0")
        if self.split is not None and not (min(self.split) > 0 and abs(sum(self.split) - 1) < 1e-9):
            shares = ",".join(f"{share:g}" for share in self.split)
            raise ConfigError(
                f"--split is {shares}; it takes the shares of train and test, each above 0 and 1 together: "
                "0.99,0.01"
            )


@dataclass(frozen=True)
class Input:
    """A source, asked once for its files and parts: that may take reading them."""

    source: SampleSource | RowSource
    files: list[tuple[str, Path]]
    parts: Sequence[Any]

    @classmethod
    def of(cls, source: SampleSource | RowSource) -> Input:
        return cls(source, source.files(), source.parts())


@dataclass(frozen=True)
class StorePlan:
    """How many parts one source has, and its input files but for their content (`sources-*.json`)."""

    parts: int
    files: int
    bytes: int
    listing_sha256: str  # of all names and sizes

    @classmethod
    def of(cls, given: Input) -> StorePlan:
        digest, total = hashlib.sha256(), 0
        for name, path in given.files:
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot read ({error.strerror})") from error
            digest.update(f"{size} {name}\n".encode("utf-8", "surrogateescape"))
            total += size
        return cls(len(given.parts), len(given.files), total, digest.hexdigest())

    def file_groups(self) -> list[range]:
        """Which files are hashed, and recorded, together: each alone unless there are very many."""
        together = 1 if self.files <= SINGLE_FILES else FILES_TOGETHER
        return [range(first, min(first + together, self.files)) for first in range(0, self.files, together)]


@dataclass(frozen=True)
class PartsPlan:
    """All that the result depends on besides the content of the input."""

    command: str
    stores: dict[str, StorePlan]  # by split, '' for the only one; parts are numbered on from one to the next
    seq_length: int
    vocabulary: Vocabulary
    tokenizer_sha256: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the source; recorded in the store
    merge: MergeOptions | None = None  # None: parts hold whole rows, and keep their order
    id_rule: IdRule = "any"

    @property
    def parts(self) -> int:
        return sum(store.parts for store in self.stores.values())

    @property
    def store_options(self) -> dict[str, Any]:
        """What `P.json` records."""
        merge = {} if self.merge is None else asdict(self.merge)
        return {
            "command": self.command,
            "seq_length": self.seq_length,
            **self.options,
            **_plain(merge),
            "plan": self.identity,
        }

    @property
    def store_names(self) -> list[str]:
        """The splits that come of it, `['']` for a single store."""
        return ["train", "test"] if self.merge and self.merge.split else list(self.stores)

    @property
    def identity(self) -> dict[str, Any]:
        """By which a rerun knows finished stores, and that none of them is missing."""
        return {"id": self.id, "stores": self.store_names}

    @property
    def id(self) -> str:
        """A hash that every part and source record carries."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        record = {"format_version": FORMAT_VERSION, **asdict(self), "vocabulary": self.vocabulary.to_dict()}
        return json.dumps(
            record, indent=1
        ).encode()  # unsorted: parts are numbered in the order of the stores

    @classmethod
    def read(cls, directory: Path) -> PartsPlan:
        """The plan of a directory of parts; `DataError` if there is none."""
        path = directory / PLAN_NAME
        try:
            record = json.loads(path.read_bytes())
            if record.pop("format_version") != FORMAT_VERSION:
                raise ValueError("of another version of this package")
            merge = record["merge"]
            if merge is not None:
                split = merge["split"]
                merge = MergeOptions(**{**merge, "split": split if split is None else tuple(split)})
            return cls(
                **{
                    **record,
                    "stores": {name: StorePlan(**store) for name, store in record["stores"].items()},
                    "vocabulary": Vocabulary.from_dict(record["vocabulary"]),
                    "merge": merge,
                }
            )
        except FileNotFoundError:
            raise DataError(
                f"{directory}: no parts here; make them first, with --shard i/n for every i, "
                "and pass the same --output-prefix"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); remove {directory} and make the parts again"
            ) from error


def parts_directory(output_prefix: str) -> Path:
    return Path(f"{output_prefix}.parts")


def check_output_prefix(output_prefix: str) -> None:
    """Say before hours of reading that nothing can be written there: a file where a directory should be."""
    what = "the prefix is a directory and the beginning of a file name: out/corpus"
    name = os.path.basename(output_prefix)
    if name in ("", ".", ".."):
        raise ConfigError(f"--output-prefix is {output_prefix!r}, which begins no file name; {what}")
    if (length := len(os.fsencode(name))) > _LONGEST_NAME:
        raise ConfigError(
            f"--output-prefix ends with a name of {length} bytes, the most is {_LONGEST_NAME}: more comes "
            "behind it, and a file name has at most 255"
        )
    parent = Path(output_prefix).parent
    with reported(parent):  # a name that is too long, a directory that may not be looked into
        for path in (parent, *parent.parents):
            if path.is_dir():
                return
            if path.exists():
                raise DataError(f"--output-prefix is {output_prefix}, but {path} is a file; {what}")


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""
    return dict(json.loads(json.dumps(record)))
