"""The converter at full size beside a plain copy of the same bytes and beside transformers.

    python benchmarks/convert.py [--layers 32] [--directory runs/benchmark] [--workers 2]

Writes a random checkpoint in the shape of Mistral-7B (bf16, sharded safetensors), copies it, imports it
with `--extend-vocab usdm`, exports it, and has transformers load and save it. Each runs alone, in a
process of its own, from a cold page cache to a synced disk. Memory is the largest sum of RssAnon over
the process tree, less that of an interpreter that has imported the same modules. Needs three times the
model's size on disk (7B: 44 GB).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

_POLL_S = 0.02
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Options:
    """What to measure."""

    layers: int = 32
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    groups: int = 8
    shard_gb: float = 5.0
    workers: int = 2
    directory: Path = Path("runs/benchmark_convert")
    peer: bool = True
    """Also measure transformers' from_pretrained + save_pretrained."""
    json: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """One process, from start to synced disk."""

    name: str
    seconds: float
    gigabytes: float  # of weights read
    peak_anonymous_gib: float  # above the interpreter's


def main(options: Options) -> None:
    """Generate, measure, print, clean up."""
    if options.directory.exists():
        raise SystemExit(f"{options.directory} exists; choose another --directory")
    options.directory.mkdir(parents=True)
    try:
        _measure_all(options)
    finally:
        shutil.rmtree(options.directory)


def _measure_all(options: Options) -> None:
    source, work = options.directory / "source", options.directory
    _run([__file__, "--generate", str(source), json.dumps(asdict(options), default=str)])
    weights = sorted(source.glob("*.safetensors"))
    gigabytes = sum(path.stat().st_size for path in weights) / 1e9
    tool = str(Path(__file__).resolve().parent.parent / "tools" / "convert_hf_checkpoint.py")
    common = ["--workers", str(options.workers)]
    results = [
        _measure("copy", [__file__, "--copy", str(source), str(work / "copy")], source, gigabytes, "os"),
    ]
    shutil.rmtree(work / "copy")
    arguments = [tool, "import", "--hf-path", str(source), "--save", str(work / "ck"), *common]
    results.append(
        _measure("import", [*arguments, "--extend-vocab", "usdm"], source, gigabytes, _BASELINE_MODULES)
    )
    arguments = [tool, "export", "--load", str(work / "ck"), "--hf-path", str(work / "hf"), *common]
    exported = _measure("export", arguments, work / "ck", gigabytes, _BASELINE_MODULES)
    results.append(exported)
    shutil.rmtree(work / "ck")
    shutil.rmtree(work / "hf")
    if options.peer:
        results.append(
            _measure(
                "transformers",
                [__file__, "--peer", str(source), str(work / "peer")],
                source,
                gigabytes,
                "torch, transformers",
            )
        )
    _print(options, results)


_BASELINE_MODULES = "torch, transformers, torch.distributed.checkpoint, usdm_megatron.cli.convert"


def _measure(name: str, arguments: list[str], source: Path, gigabytes: float, modules: str) -> Measurement:
    floor = _run(["-c", f"import {modules}; import time; time.sleep(0.5)"]).peak_bytes
    _drop_from_page_cache(source)
    os.sync()
    ran = _run(arguments)
    return Measurement(name, ran.seconds, gigabytes, max(0, ran.peak_bytes - floor) / 2**30)


@dataclass(frozen=True)
class _Ran:
    seconds: float
    peak_bytes: int


def _run(arguments: list[str]) -> _Ran:
    """Run Python with `arguments` and watch the anonymous memory of its process tree."""
    started_at = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_anonymous_bytes(process.pid))
        time.sleep(_POLL_S)
    if process.returncode:
        raise SystemExit(f"{arguments[:2]} ended with {process.returncode}")
    return _Ran(time.perf_counter() - started_at, peak)


def _tree_anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its descendants; mapped file pages are not memory that a job needs."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += _tree_anonymous_bytes(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended between two looks
    return total


def _drop_from_page_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _print(options: Options, results: list[Measurement]) -> None:
    copied = next(result for result in results if result.name == "copy")
    print(
        f"{options.layers} layers of {options.hidden}, {copied.gigabytes:.1f} GB bf16, {options.workers} "
        f"workers; {platform.machine()}, {os.cpu_count()} cores"
    )
    for result in results:
        print(
            f"{result.name:14} {result.seconds:7.1f} s  {result.gigabytes / result.seconds:5.2f} GB/s  "
            f"{copied.seconds / result.seconds:5.2f} x the copy  "
            f"peak {result.peak_anonymous_gib:5.2f} GiB anonymous"
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def _generate(target: Path, options: dict[str, float]) -> None:
    """A model directory of random weights, a tensor in memory at a time; the bytes do not compress."""
    import torch

    from usdm_megatron.architecture import HFArchitecture
    from usdm_megatron.convert.name_table import architecture_table
    from usdm_megatron.convert.safetensors_writer import INDEX_FILE, index_of, plan_shards, write_shard
    from usdm_megatron.demo.tokenizer import write_mistral_tokenizer

    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": options["hidden"],
        "intermediate_size": options["ffn"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "num_key_value_heads": options["groups"],
        "max_position_embeddings": 32_768,
        "sliding_window": 4_096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    target.mkdir(parents=True)
    write_mistral_tokenizer(target)
    (target / "config.json").write_text(json.dumps(config))
    shapes = architecture_table(config).hf_shapes(HFArchitecture.from_hf_config(config))
    shards = plan_shards(shapes, "bf16", int(options["shard_gb"] * 1e9))
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        tensors = (
            (name, torch.randint(-(2**13), 2**13, shape, generator=generator, dtype=torch.int16))
            for name, shape in shard.shapes.items()
        )
        write_shard(target, shard, "bf16", ((name, t.to(torch.bfloat16)) for name, t in tensors))
    if len(shards) > 1:
        (target / INDEX_FILE).write_text(json.dumps(index_of(shards, "bf16")))


def _copy(source: Path, target: Path) -> None:
    """Every file, read and written in large blocks, synced."""
    target.mkdir()
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as reading, (target / path.name).open("wb", buffering=0) as writing:
            while count := reading.readinto(buffer):
                writing.write(buffer[:count])
            os.fsync(writing.fileno())


def _peer(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    model.save_pretrained(target, max_shard_size="5GB")
    os.sync()


if __name__ == "__main__":
    roles = {"--generate": _generate, "--copy": _copy, "--peer": _peer}
    if len(sys.argv) > 1 and sys.argv[1] in roles:  # a child of ours
        first, second = sys.argv[2:]
        if sys.argv[1] == "--generate":
            _generate(Path(first), json.loads(second))
        else:
            roles[sys.argv[1]](Path(first), Path(second))
    else:
        main(tyro.cli(Options))
