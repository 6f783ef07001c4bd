"""Hardware: presets with sources, a YAML file that comes back the same, and every field checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from usdm_megatron.errors import ConfigError
from usdm_megatron.plan.gpus import GPUS
from usdm_megatron.plan.hardware import RATE_FIELDS, Hardware, Rate, find_hardware


def write(path: Path, **fields: object) -> str:
    path.write_text(yaml.safe_dump(fields))
    return str(path)


@pytest.mark.parametrize("name", GPUS)
def test_presets_say_where_each_rate_is_from_and_survive_yaml(name: str, tmp_path: Path) -> None:
    gpu = find_hardware(name)
    assert {rate.source for rate in gpu.rates.values()} == {"published"}
    assert all("." in rate.reference for rate in gpu.rates.values())
    assert gpu.peak_tflops is not None
    for field in ("gemm_tflops", "attention_tflops"):
        assert max(value for _, value in getattr(gpu, field).points) < gpu.peak_tflops
    assert find_hardware(write(tmp_path / "gpu.yaml", **gpu.to_tree())) == gpu


def test_a_minimal_file_has_no_rates(tmp_path: Path) -> None:
    gpu = find_hardware(write(tmp_path / "mine.yaml", memory_gib=100, peak_tflops=500))
    assert gpu == Hardware("mine", 100.0, pytest.approx(89.0), 8, 500.0)
    assert not any(rate.known for rate in gpu.rates.values())
    none = find_hardware(
        write(tmp_path / "mine.yaml", memory_gib=100, peak_tflops=500, gemm_tflops={"source": "none"})
    )
    assert none == gpu
    assert (
        find_hardware(write(tmp_path / "c.yaml", memory_gib=1, peak_tflops=None, device="cpu")).dtype
        == "fp32"
    )


def test_rates_are_read_between_their_points() -> None:
    rate = Rate("measured", "", ((1024.0, 100.0), (4096.0, 200.0)))
    assert [rate.at(size) for size in (1, 1024, 2048, 4096, 1e9)] == pytest.approx([100, 100, 150, 200, 200])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peak_tflops": 5}, ["memory_gib is missing"]),
        ({"memory_gib": 5}, ["peak_tflops is missing"]),
        ({"memory_gib": -1, "peak_tflops": "fast"}, ["memory_gib is -1", "peak_tflops is 'fast'"]),
        ({"memory_gib": 5, "peak_tflops": 5, "memory_budget_gib": 6}, ["is more than memory_gib"]),
        ({"memory_gib": 5, "peak_tflops": 5, "gpus_per_nod": 4}, ["did you mean gpus_per_node?"]),
        ({"memory_gib": 5, "peak_tflops": 5, "gpus_per_node": 0}, ["gpus_per_node is 0"]),
        ({"memory_gib": 5, "peak_tflops": 5, "device": "tpu"}, ["must be cuda or cpu"]),
        ({"memory_gib": 5, "peak_tflops": 5, "gemm_tflops": {"at": {}}}, ["gemm_tflops.at is {}"]),
        ({"memory_gib": 5, "peak_tflops": 5, "gemm_tflops": {"at": {1: 0}}}, ["gemm_tflops.at[1] is 0"]),
        *(
            ({"memory_gib": 5, "peak_tflops": 5, "gemm_tflops": {"source": source, "at": {1: 5}}}, [says])
            for source, says in (
                ("published", "reference is missing; say where the figure was published"),
                ("measured", "reference is missing; say where the figure was measured"),
                ("none", "gemm_tflops.at is {1: 5} and its source none"),
            )
        ),
        ({"memory_gib": 5, "peak_tflops": 5, "gemm_tflops": 271.2}, ["must say where the figure is from"]),
        ({"memory_gib": 5, "peak_tflops": 5, "dtype": "fp8"}, ["dtype is 'fp8'; it must be bf16 or fp32"]),
        (
            {"memory_gib": 5, "peak_tflops": 5, "gemm_tflops": {"source": "guessed", "att": {1: 5}}},
            ["source is 'guessed'", "did you mean gemm_tflops.at?"],
        ),
    ],
)
def test_a_bad_file_is_refused_with_all_its_problems(
    fields: dict[str, object], says: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        find_hardware(write(tmp_path / "gpu.yaml", **fields))
    assert all(part in str(caught.value) for part in says), caught.value


def test_an_unknown_gpu_names_the_known() -> None:
    with pytest.raises(ConfigError, match="did you mean a100-80gb.*a100-40gb, a100-80gb, h100, h200.*YAML"):
        find_hardware("A100-80G")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_hardware("nowhere.yaml")
    assert len(RATE_FIELDS) == 5
