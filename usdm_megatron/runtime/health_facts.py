"""What one rank sees of its machine: versions, limits, disk, its GPU and how fast that multiplies."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess  # nosec B404: nvidia-smi, with fixed arguments
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "usdm-megatron",
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "flash-attn",
    "numpy",
)
_WRITTEN_BYTES = 64 << 20
_GPU_FIELDS = (
    "uuid",
    "memory.used",
    "temperature.gpu",
    "clocks.sm",
    "clocks.max.sm",
    "clocks_throttle_reasons.hw_slowdown",
    "ecc.errors.uncorrected.volatile.total",
)


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as torch and nvidia-smi name it; None where the driver does not say."""

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    temperature_celsius: int | None = None
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    is_slowed_down: bool | None = None
    uncorrected_errors: int | None = None


@dataclass(frozen=True)
class RankFacts:
    """One rank's machine; `unmet` are requirements of this package that its environment does not meet."""

    rank: int
    host: str
    versions: dict[str, str]
    unmet: tuple[str, ...]
    environment: dict[str, str]
    gpu: GpuFacts | None
    matmul_tflops: float
    free_bytes: int
    written_bytes_per_s: float
    open_files: int
    shared_memory_bytes: int


def look_around(rank: int, device: torch.device, directory: Path) -> RankFacts:
    """The facts of this rank; writes and removes 64 MiB in `directory` (raises `OSError` if it cannot)."""
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        versions=installed_versions(),
        unmet=tuple(unmet_requirements()),
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("NCCL_", "NVTE_", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_"))
        },
        gpu=_gpu(device) if device.type == "cuda" else None,
        matmul_tflops=_matmul_tflops(device),
        free_bytes=shutil.disk_usage(directory).free,
        written_bytes_per_s=_written_bytes_per_s(directory),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,  # nosec B108
    )


def installed_versions() -> dict[str, str]:
    """Version by package that a run uses, or `not installed`; CUDA's and NCCL's where torch has them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    versions["cuda"] = str(torch.version.cuda or "none")
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["driver"] = _nvidia_smi("driver_version").get("driver_version", "unknown")
    return versions


def unmet_requirements() -> Iterator[str]:
    """Requirements of this package that are missing or of another version, as sentences."""
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires("usdm-megatron") or []
    except metadata.PackageNotFoundError:
        yield "usdm-megatron is not installed, its requirements are unknown; pip install -e . in its folder"
        return
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield f"{requirement.name} is not installed; pip install '{requirement}'"
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}; pip install '{requirement}'"


def parse_nvidia_smi(fields: tuple[str, ...], line: str) -> dict[str, str]:
    """One line of `nvidia-smi --format=csv,noheader,nounits` by field, without what the driver can't tell."""
    values = [value.strip() for value in line.split(",")]
    known = zip(fields, values, strict=True)
    return {field: value for field, value in known if not value.startswith(("[", "N/A"))}


def _gpu(device: torch.device) -> GpuFacts:
    """Has not run yet on a machine with a GPU."""
    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else str(device.index)
    free, total = torch.cuda.mem_get_info(device)
    told = _nvidia_smi(*_GPU_FIELDS, gpu=uuid)
    slowed = told.get("clocks_throttle_reasons.hw_slowdown")
    return GpuFacts(
        uuid=uuid,
        name=properties.name,
        total_bytes=total,
        free_bytes=free,
        temperature_celsius=_integer(told.get("temperature.gpu")),
        clock_mhz=_integer(told.get("clocks.sm")),
        max_clock_mhz=_integer(told.get("clocks.max.sm")),
        is_slowed_down=None if slowed is None else slowed == "Active",
        uncorrected_errors=_integer(told.get("ecc.errors.uncorrected.volatile.total")),
    )


def _nvidia_smi(*fields: str, gpu: str = "0") -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)  # nosec B603
    lines = answer.stdout.splitlines()
    return parse_nvidia_smi(fields, lines[0]) if answer.returncode == 0 and lines else {}


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _matmul_tflops(device: torch.device, repeats: int = 10) -> float:
    """Rate of one square product, warmed up: a GPU that is slower than its neighbours slows them all."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    torch.mm(a, b).sum().item()
    start = time.perf_counter()
    for _ in range(repeats):
        c = torch.mm(a, b)
    c[0, 0].item()  # waits for the device
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def _written_bytes_per_s(directory: Path) -> float:
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(_WRITTEN_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return _WRITTEN_BYTES / (time.perf_counter() - start)
