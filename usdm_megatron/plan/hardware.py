"""What a GPU and its links can do: peaks of the data sheet, and what kernels reach, each with its source.

A `Rate` is a figure that somebody measured: here (`plan --calibrate`), or elsewhere and published. Where
nobody did there is none, and nothing that depends on it is predicted.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from usdm_megatron.errors import ConfigError

Source = Literal["measured", "published", "none"]
Device = Literal["cuda", "cpu"]
DataType = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Rate:
    """What was reached, by size; between sizes linear in the size's logarithm, beyond them the nearest.

    Sizes: see the fields of `Hardware`. `points` ascend by size; none of them: nobody measured.
    """

    source: Source = "none"
    reference: str = ""
    points: tuple[tuple[float, float], ...] = ()

    @property
    def known(self) -> bool:
        return bool(self.points)

    def at(self, size: float) -> float:
        """The rate for `size`; only of a known rate."""
        sizes = [point[0] for point in self.points]
        right = bisect_right(sizes, size)
        if right in (0, len(sizes)):
            return self.points[0 if right == 0 else -1][1]
        (low, low_rate), (high, high_rate) = self.points[right - 1], self.points[right]
        return low_rate + (high_rate - low_rate) * math.log(size / low) / math.log(high / low)


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU (or rank on a CPU) in nodes of `gpus_per_node`; rates of one rank.

    GEMMs are counted as they are, attention as seven products of the causal pairs (two forward, five
    backward, as FlashAttention counts). Link rates are NCCL's bus bandwidth, one direction.
    """

    name: str
    memory_gib: float  # as the allocator sees it
    memory_budget_gib: float  # without contexts, NCCL's buffers, workspaces and fragmentation
    gpus_per_node: int
    peak_tflops: float | None  # dense, of `dtype`; None: unknown, and so is MFU
    device: Device = "cuda"
    dtype: DataType = "bf16"  # of weights and activations where the rates were measured
    gemm_tflops: Rate = field(default_factory=Rate)  # by tensor parallel size, the layer's shapes
    attention_tflops: Rate = field(default_factory=Rate)  # by tokens of a sample
    memory_gb_per_s: Rate = field(default_factory=Rate)  # elementwise kernels, bytes read and written
    node_gb_per_s: Rate = field(default_factory=Rate)  # by bytes of a collective, inside a node
    network_gb_per_s: Rate = field(default_factory=Rate)  # by bytes, of one GPU's network interface

    @property
    def rates(self) -> dict[str, Rate]:
        """Every rate by its field's name."""
        return {name: getattr(self, name) for name in RATE_FIELDS}

    def to_tree(self) -> dict[str, Any]:
        """Plain values for YAML; `read_hardware` gives the same back."""
        tree = {key: value for key, value in asdict(self).items() if key not in RATE_FIELDS}
        for name, rate in self.rates.items():
            if rate.known:
                at = {_plain(size): value for size, value in rate.points}
                tree[name] = {"source": rate.source, "reference": rate.reference, "at": at}
        return tree


RATE_FIELDS = tuple(entry.name for entry in fields(Hardware) if entry.type == "Rate")
_OPTIONAL = ("name", "device", "dtype", "memory_budget_gib", "gpus_per_node", *RATE_FIELDS)
_RATE_KEYS = ("source", "reference", "at")
USABLE_SHARE = 0.89  # 35 of an A100-40GB's 39.4 GiB


def find_hardware(gpu: str) -> Hardware:
    """A preset by name, or the description in a YAML file; `ConfigError` naming what there is."""
    from usdm_megatron.plan.gpus import GPUS

    if gpu in GPUS:
        return GPUS[gpu]
    if Path(gpu).suffix in (".yaml", ".yml") or Path(gpu).is_file():
        return read_hardware(Path(gpu))
    close = difflib.get_close_matches(gpu.lower(), GPUS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"plan: --gpu {gpu} is not known; {hint}known are {', '.join(GPUS)}, or give a YAML file "
        "(usdm-megatron plan --calibrate FILE.yaml measures one)"
    )


def read_hardware(path: Path) -> Hardware:
    """A description from YAML; `ConfigError` with every unknown key and every value out of range."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--gpu {path}: cannot be read: {error}; give a YAML file") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--gpu {path}: holds a {type(tree).__name__}; it must hold the fields of a GPU")
    known = [entry.name for entry in fields(Hardware)]
    problems = _unknown_keys(path, "", tree, known)
    problems += [
        f"--gpu {path}: {name} is missing; give it (peak_tflops may be null)"
        for name in known
        if name not in tree and name not in _OPTIONAL
    ]
    values: dict[str, Any] = {"name": str(tree.get("name", path.stem))}
    values["peak_tflops"] = _number(path, "peak_tflops", tree.get("peak_tflops"), problems, optional=True)
    values["memory_gib"] = _number(path, "memory_gib", tree.get("memory_gib", 1.0), problems)
    budget = tree.get("memory_budget_gib", USABLE_SHARE * (values["memory_gib"] or 0.0))
    values["memory_budget_gib"] = _number(path, "memory_budget_gib", budget, problems)
    values["gpus_per_node"] = tree.get("gpus_per_node", 8)
    if type(values["gpus_per_node"]) is not int or values["gpus_per_node"] < 1:
        problems.append(
            f"--gpu {path}: gpus_per_node is {values['gpus_per_node']!r}; it must be a count, at least 1"
        )
    values["device"] = _one_of(path, "device", tree.get("device", "cuda"), ("cuda", "cpu"), problems)
    usual = "fp32" if values["device"] == "cpu" else "bf16"
    values["dtype"] = _one_of(path, "dtype", tree.get("dtype", usual), ("bf16", "fp32"), problems)
    if not problems and values["memory_budget_gib"] > values["memory_gib"]:
        problems.append(
            f"--gpu {path}: memory_budget_gib {values['memory_budget_gib']} is more than memory_gib "
            f"{values['memory_gib']}; lower it"
        )
    values |= {name: _rate(path, name, tree[name], problems) for name in RATE_FIELDS if name in tree}
    if problems:
        raise ConfigError(*problems)
    return Hardware(**values)


def _rate(path: Path, name: str, tree: Any, problems: list[str]) -> Rate:
    """`{source: measured, reference: …, at: {size: rate}}`, or `{source: none}`."""
    if not isinstance(tree, Mapping):
        problems.append(
            f"--gpu {path}: {name} is {tree!r}; it must say where the figure is from, as in {{source: "
            "measured, reference: our bench, at: {1: 271.2}}"
        )
        return Rate()
    problems += _unknown_keys(path, f"{name}.", tree, _RATE_KEYS)
    at = tree.get("at")
    source = _one_of(path, f"{name}.source", tree.get("source"), ("measured", "published", "none"), problems)
    if source == "none":
        if at is not None:
            problems.append(f"--gpu {path}: {name}.at is {at!r} and its source none; name one, or drop it")
        return Rate()
    if not tree.get("reference"):
        problems.append(f"--gpu {path}: {name}.reference is missing; say where the figure was {source}")
    if not isinstance(at, Mapping) or not at:
        problems.append(
            f"--gpu {path}: {name}.at is {at!r}; it must say the rate by size, as in {{1: 271.2}}"
        )
        return Rate()
    points = []
    for size, rate in at.items():
        where = f"{name}.at[{size}]"
        points.append(
            (_number(path, f"a size of {name}.at", size, problems), _number(path, where, rate, problems))
        )
    if any(size is None or rate is None for size, rate in points):
        return Rate()
    return Rate(source, str(tree.get("reference", "")), tuple(sorted(points)))  # type: ignore[arg-type]


def _one_of(path: Path, name: str, value: Any, known: tuple[str, ...], problems: list[str]) -> Any:
    if value not in known:
        problems.append(f"--gpu {path}: {name} is {value!r}; it must be {' or '.join(known)}")
    return value


def _number(
    path: Path, name: str, value: Any, problems: list[str], *, optional: bool = False
) -> float | None:
    if value is None and optional:
        return None
    ok = (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
    if not ok:
        problems.append(f"--gpu {path}: {name} is {value!r}; it must be a positive number")
        return None
    return float(value)


def _unknown_keys(path: Path, prefix: str, tree: Mapping[Any, Any], known: Any) -> list[str]:
    problems = []
    for key in tree:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key), list(known), n=1)
        hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(known)}"
        problems.append(f"--gpu {path}: {prefix}{key}: unknown key; {hint}")
    return problems


def _plain(size: float) -> float | int:
    return int(size) if float(size).is_integer() else size
