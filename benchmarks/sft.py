"""Fine-tuning beside its peers: all weights and LoRA, ours against transformers' Trainer and PEFT's models.

    python benchmarks/sft.py [--threads 1 2] [--precisions fp32 bf16] [--repeats 5] [--json FILE] …

Same weights, dialogs, first adapters, optimizer and objective; a process each, which take turns, a step a
turn. The first steps' losses of all are compared before anything is timed (fp32 1e-5, bf16 2e-2), and
memory is measured in them: RssAnon, as this process sees it (with MALLOC_MMAP_THRESHOLD_=262144 in the
environment without what malloc keeps for later). Peers: `padded` as the original pads a
micro-batch, `flattened` with transformers' padding-free collator. In bf16 ours has bf16 weights with fp32
masters; the peers `autocast` over fp32 weights (a LoRA's base in bf16), `pure` bf16 weights without masters.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro
from sft_contestants import Form, Job, Precision, Turn, contestant_main
from sft_inputs import ADAPTER_FILE, Shape, make_dialogs, write_first_a, write_model, write_store
from side_by_side import machine

from usdm_megatron.lora_spec import TARGETS

# What is trained: the projections of LoRA, or all weights. The first two are PEFT's default for Mistral.
GROUPS: dict[str, tuple[str, ...]] = {"full": (), "lora q v": ("q_proj", "v_proj"), "lora all": TARGETS}
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 2e-2}
_POLL_S = 0.002
_DEADLINE_S = 1200


@dataclass(frozen=True)
class Options:
    """What to measure."""

    groups: tuple[str, ...] = tuple(GROUPS)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 5
    compared: int = 2
    """Steps before them, whose losses are compared and in which memory is measured."""
    micro_batch: int = 2
    global_batch: int = 8
    """Dialogs; both are the original's."""
    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    """With more than 0 masks differ, and only the first step's losses are compared."""
    lr: float = 2e-5
    shape: Shape = field(default_factory=Shape)
    directory: Path | None = None
    json: Path | None = None


@dataclass(frozen=True)
class Result:
    """Of one contestant: medians over the timed steps; memory is anonymous, in bytes."""

    group: str
    name: str
    trainable_parameters: int
    optimizer_bytes: int
    imported_bytes: int
    loaded_peak_bytes: int
    step_peak_bytes: int
    losses: tuple[float, ...]
    wall_s: float
    cpu_s: float
    tokens_per_s: float
    overhead: float  # share of the step that is neither forward, backward nor optimizer
    wall_ratio: float  # this one's time over ours, median over steps of the same rows
    cpu_ratio: float

    def line(self, ours: Result) -> str:
        """For a table."""
        peak, above_imports = (
            self.step_peak_bytes / 2**20,
            (self.step_peak_bytes - self.imported_bytes) / 2**20,
        )
        columns = (
            f"{self.group:<10}{self.name:<20}{self.trainable_parameters:>11,}",
            f"{self.optimizer_bytes / 2**20:8.2f}{peak:7.0f}{above_imports:7.0f}",
            f"{ours.step_peak_bytes / self.step_peak_bytes:6.2f}",
            f"{self.wall_s * 1e3:8.0f}{self.cpu_s * 1e3:8.0f}{self.tokens_per_s:7.0f}{self.overhead:8.2%}",
            f"{self.wall_ratio:7.2f}x{self.cpu_ratio:6.2f}x",
        )
        return "".join(columns)


_HEADER = (
    f"{'':<30}{'trainable':>11}{'optim.':>8}{'memory':>7}{'above':>7}{'ours/':>6}{'wall':>8}{'CPU':>8}"
    f"{'tok/s':>7}{'rest':>8}{'wall':>8}{'CPU':>7}"
)


class Process:
    """A contestant's process, and its memory."""

    def __init__(self, group: str, name: str, job: Job) -> None:
        self.group, self.name = group, name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=contestant_main, args=(theirs, job), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()
        self.imported_bytes = self._anonymous_bytes()
        self.loaded_peak_bytes = self._watched("load")[0]
        self.step_peak_bytes = 0
        self.turns: list[Turn] = []

    def turn(self, *, watched: bool) -> None:
        """One step; `watched` ones measure memory, whose reading disturbs the clock."""
        if watched:
            peak, turn = self._watched("step")
            self.step_peak_bytes = max(self.step_peak_bytes, peak)
        else:
            self._connection.send("step")
            turn = self._receive()
        self.turns.append(turn)

    def end(self) -> None:
        self._process.kill()  # its run would go on to the last step, and save
        self._process.join()

    def _watched(self, command: str) -> tuple[int, Any]:
        self._connection.send(command)
        peak = self._anonymous_bytes()
        while not self._connection.poll(_POLL_S) and self._process.is_alive():
            peak = max(peak, self._anonymous_bytes())
        return peak, self._receive()

    def _receive(self) -> Any:
        if not self._connection.poll(_DEADLINE_S):
            raise TimeoutError(f"{self.name} has not answered for {_DEADLINE_S} s")
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.group}, {self.name}: its process died; its output says why") from None

    def _anonymous_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        return int(lines[0].split()[1]) * 1024 if lines else 0


def main(options: Options) -> None:
    """Measure and print."""
    print(machine())
    tables = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        prepare(options, Path(directory))
        for precision in options.precisions:
            for threads in options.threads:
                tables.append(run_table(options, Path(directory), precision, threads))
    if options.json is not None:
        record = {
            "options": {**asdict(options), "directory": str(options.directory), "json": str(options.json)},
            "machine": machine(),
            "measured": tables,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def prepare(options: Options, directory: Path) -> None:
    """The model in both formats, the dialogs' store, the adapters' first values."""
    vocabulary = options.shape.vocabulary
    rows = (options.compared + options.repeats + 1) * options.global_batch
    dialogs = make_dialogs(rows, vocabulary)
    lengths = dialogs.lengths
    write_store(directory / "dialogs", dialogs, vocabulary)
    write_model(directory / "hf", directory / "checkpoint", options.shape)
    write_first_a(directory / ADAPTER_FILE, directory / "hf", options.r)
    print(
        f"{rows} dialogs of {lengths.min()} to {lengths.max()} tokens, mean {lengths.mean():.0f}; "
        f"a step is {options.global_batch}, {options.micro_batch} at a time"
    )


def run_table(options: Options, directory: Path, precision: Precision, threads: int) -> dict[str, Any]:
    """All contestants at one precision and number of threads: compare, then time, print."""
    with _processes(options, directory, precision, threads) as processes:
        for step in range(options.compared):
            for process in processes:
                process.turn(watched=True)
            if step == 0 or options.dropout == 0:
                check_losses(processes, step, _TOLERANCE[precision])
        before = os.getloadavg()[0]
        for _ in range(options.repeats):
            for process in processes:
                process.turn(watched=False)
    load = before, os.getloadavg()[0]
    results = _results(options, processes)
    title = f"{precision}, {threads} thread{'s' * (threads > 1)}, load {load[0]:.1f} to {load[1]:.1f}"
    _print_table(title, results)
    return {
        "precision": precision,
        "threads": threads,
        "load": load,
        "results": [asdict(one) for one in results],
    }


@contextmanager
def _processes(
    options: Options, directory: Path, precision: Precision, threads: int
) -> Iterator[list[Process]]:
    found: list[Process] = []
    try:
        for group in options.groups:
            for name, form, autocast in _contestants(precision):
                job = Job(
                    form=form,
                    targets=GROUPS[group],
                    precision=precision,
                    autocast=autocast,
                    threads=threads,
                    steps=options.compared + options.repeats,
                    micro_batch=options.micro_batch,
                    global_batch=options.global_batch,
                    r=options.r,
                    alpha=options.alpha,
                    dropout=options.dropout,
                    lr=options.lr,
                    shape=options.shape,
                    directory=directory,
                )
                found.append(Process(group, name, job))
        yield found
    finally:
        for process in found:
            process.end()


def _contestants(precision: Precision) -> list[tuple[str, Form, bool]]:
    """Name, form, autocast; ours first."""
    ours: tuple[str, Form, bool] = ("ours", "ours", False)
    if precision == "fp32":
        return [ours, ("padded", "padded", False), ("flattened", "flattened", False)]
    return [
        ours,
        ("padded, autocast", "padded", True),
        ("flattened, autocast", "flattened", True),
        ("flattened, pure", "flattened", False),
    ]


def check_losses(processes: Sequence[Process], step: int, tolerance: float) -> None:
    """Raise `AssertionError` unless all of a group have ours; at the first step, all of all groups."""
    ours: dict[str, float] = {}
    for process in processes:
        loss = process.turns[step].loss
        expected = ours.setdefault("" if step == 0 else process.group, loss)
        if not abs(loss - expected) <= tolerance * expected:
            raise AssertionError(
                f"step {step + 1}: {process.group}, {process.name}: loss {loss}, not {expected}"
            )


def _results(options: Options, processes: Sequence[Process]) -> list[Result]:
    rows = make_dialogs((options.compared + options.repeats) * options.global_batch, options.shape.vocabulary)
    tokens = rows.lengths.reshape(-1, options.global_batch).sum(axis=1)[options.compared :].tolist()
    first = {process.group: process for process in reversed(processes)}
    results = []
    for process in processes:
        turns, ours = (one.turns[options.compared :] for one in (process, first[process.group]))
        results.append(
            Result(
                group=process.group,
                name=process.name,
                trainable_parameters=turns[-1].facts.trainable_parameters,
                optimizer_bytes=turns[-1].facts.optimizer_bytes,
                imported_bytes=process.imported_bytes,
                loaded_peak_bytes=process.loaded_peak_bytes,
                step_peak_bytes=process.step_peak_bytes,
                losses=tuple(turn.loss for turn in process.turns),
                wall_s=statistics.median(turn.wall_s for turn in turns),
                cpu_s=statistics.median(turn.cpu_s for turn in turns),
                tokens_per_s=statistics.median(n / t.wall_s for n, t in zip(tokens, turns, strict=True)),
                overhead=statistics.median(1 - turn.compute_s / turn.wall_s for turn in turns),
                wall_ratio=statistics.median(a.wall_s / b.wall_s for a, b in zip(turns, ours, strict=True)),
                cpu_ratio=statistics.median(a.cpu_s / b.cpu_s for a, b in zip(turns, ours, strict=True)),
            )
        )
    return results


def _print_table(title: str, results: Sequence[Result]) -> None:
    """A line a contestant: MiB of optimizer, of the process, of it above its imports; ours over this one's
    memory; ms a step; share of it that is the trainer's; this one's time over ours."""
    print(f"\n{title}\n{_HEADER}")
    ours = {one.group: one for one in reversed(results)}
    for one in results:
        print(one.line(ours[one.group]), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
