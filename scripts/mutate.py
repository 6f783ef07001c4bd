#!/usr/bin/env python
"""Prove that the tests can fail: one named fault at a time in a copy of the repository, and its tests.

    python scripts/mutate.py                   every fault; exit 1 if one survives
    python scripts/mutate.py --only NAME ...   some of them
    python scripts/mutate.py --list            names, and what each one breaks
    python scripts/mutate.py --markdown        the table of tests/faults.md

The working tree is only read. A fault is caught when every test named for it fails by an assertion: a
crash of the broken copy (import error, a rank that raised) proves nothing and is reported as such. Each
fault is a silent one: the run goes on, and its numbers are wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINE_TIMEOUT_S, FAULT_TIMEOUT_S = 900, 180


@dataclass(frozen=True)
class Fault:
    """One edit (`old` occurs exactly once in `file`), and the tests that must fail for it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str  # why nothing else would show it


_LOGITS = "tests/training/test_model_parity.py::test_logits_equal_transformers"
_GRADIENTS = "tests/training/test_model_parity.py::test_gradients_equal_transformers"
_ISOLATION = "tests/training/test_isolation.py::test_changing_a_sample_changes_no_other_logit"
_INVARIANCE = "tests/training/test_invariance.py::test_loss_and_gradients_do_not_depend_on"
_PADDING = "tests/training/test_invariance.py::test_padding_of_the_vocabulary_adds_nothing"
_RESUME = "tests/training/test_resume.py::"
_TABLE = "tests/convert_floor/test_name_table.py::"
_BATCH = "tests/data_floor/test_packed_batch.py::"
_ROWS = "tests/data_floor/test_row_order.py::"
_BRUTE_FORCE = f"{_BATCH}test_equals_the_builder_that_goes_token_by_token"
_LATE_GATHER = "test_a_checkpoint_holds_the_last_update_when_parameters_are_gathered_late"
_CORRECTED = "tests/training/test_faults_caught.py::test_corrected_training_equals_plain_pytorch"

FAULTS = (
    Fault(
        "window-one-up",
        "usdm_megatron/model/architecture.py",
        "else (window - 1, 0)",
        "else (window, 0)",
        (f"{_LOGITS}[1x1x1]",),
        "one key more per query: the loss hardly moves, and only samples longer than the window differ",
    ),
    Fault(
        "window-one-down",
        "usdm_megatron/model/architecture.py",
        "else (window - 1, 0)",
        "else (window - 2, 0)",
        (f"{_LOGITS}[1x1x1]",),
        "one key less per query, as above",
    ),
    Fault(
        "isolation-off",
        "usdm_megatron/model/attention.py",
        "for length in row.segment_lengths:",
        "for length in (sum(row.segment_lengths),):",
        (f"{_ISOLATION}[1x1x1]", f"{_LOGITS}[1x1x1]"),
        "samples of a row see each other; training even profits a little, generation suffers",
    ),
    Fault(
        "isolation-off-in-the-batch",
        "usdm_megatron/data/batch.py",
        'row.sample_lengths if cross_sample_attention == "masked" else',
        'row.sample_lengths if cross_sample_attention == "never" else',
        (_BRUTE_FORCE, f"{_ISOLATION}[1x1x1]"),
        "the same by cu_seqlens that do not know the samples",
    ),
    Fault(
        "qkv-order",
        "usdm_megatron/convert/name_table.py",
        'for name in "qkv"',
        'for name in "qvk"',
        (f"{_TABLE}test_qkv_rows_by_sentinels", f"{_LOGITS}[1x1x1]"),
        "keys and values have one shape, and the round trip undoes the swap: export is bit-exact",
    ),
    Fault(
        "qkv-not-by-group",
        "usdm_megatron/convert/name_table.py",
        "g = model.kv_heads",
        "g = 1",
        (f"{_TABLE}test_qkv_rows_by_sentinels", f"{_LOGITS}[1x1x1]"),
        "[all q, all k, all v] has the same shape as core's order by query group",
    ),
    Fault(
        "gate-and-up-swapped",
        "usdm_megatron/convert/name_table.py",
        '(f"{_HF_LAYER}.mlp.gate_proj.weight", f"{_HF_LAYER}.mlp.up_proj.weight"),',
        '(f"{_HF_LAYER}.mlp.up_proj.weight", f"{_HF_LAYER}.mlp.gate_proj.weight"),',
        (f"{_TABLE}test_gate_comes_before_up", f"{_LOGITS}[1x1x1]"),
        "both have one shape, and the round trip undoes the swap",
    ),
    Fault(
        "pads-in-the-softmax",
        "usdm_megatron/model/loss.py",
        "columns = min(max(vocabulary_size - first_column, 0), width)",
        "columns = width",
        (f"{_PADDING}[1x1x1]", f"{_GRADIENTS}[1x1x1]"),
        "a loss a few hundredths of a nat too high, falling as it should",
    ),
    Fault(
        "norm-gradient-not-summed",
        "usdm_megatron/model/layer_spec.py",
        "self.weight.sequence_parallel = config.sequence_parallel",
        "self.weight.sequence_parallel = False",
        (f"{_GRADIENTS}[2x1x1-sp]", f"{_INVARIANCE}[2x1x1-sp-4]"),
        "each tensor parallel rank steps its norms by its own slice of the sequence; the copies drift apart",
    ),
    Fault(
        "shared-adam-step",
        "usdm_megatron/train/optimizer.py",
        "self._set_steps(steps)",
        "self._set_steps(steps); s = torch.tensor(float(steps)); [e.update(step=s) for e in states.values()]",
        (f"{_RESUME}test_resume_is_bit_exact[1x1x1-{{}}]",),
        "bias correction is off after a resume only, and fades",
    ),
    Fault(
        "masters-not-reloaded",
        "usdm_megatron/train/optimizer.py",
        "self._sharded.reload_model_params()",
        "pass",
        (f"{_RESUME}test_a_bf16_start_does_not_jump",),
        "fp32 masters are views and cannot show it; in bf16 the first update brings the random start back",
    ),
    Fault(
        "labels-shifted-across-rows",
        "usdm_megatron/data/batch.py",
        "    lengths = np.concatenate(segments)",
        "    for end in range(seq_length - 1, size - 1, seq_length):\n"
        "        labels[end], loss_mask[end] = tokens[end + 1], tokens[end] != vocabulary.pad_id\n"
        "    lengths = np.concatenate(segments)",
        (f"{_BATCH}test_the_last_token_of_a_row_is_not_trained_on_the_next_rows_bos", _BRUTE_FORCE),
        "one wrong target a row, and only with micro-batches of two rows or more that are full",
    ),
    Fault(
        "a-row-skipped",
        "usdm_megatron/data/order.py",
        "start = step_in_epoch * self.global_batch_size",
        "start = step_in_epoch * self.global_batch_size + min(step_in_epoch, 1)",
        (f"{_ROWS}test_the_ledger_over_all_ranks_is_the_store_in_order",),
        "nobody misses one row of a hundred thousand",
    ),
    Fault(
        "unit-rows-permuted-on-export",
        "usdm_megatron/convert/name_table.py",
        "parts = (tensor[: model.vocab_size],)",
        "parts = (torch.cat((tensor[:32_002], tensor[32_002 : model.vocab_size].flip(0))),)",
        (
            "tests/convert_floor/test_new_rows.py::test_the_checkpoint_holds_them_whatever_its_type",
            "tests/convert_floor/test_round_trip.py::test_a_model_that_has_the_tokens_is_taken_as_it_is",
        ),
        "shapes and text are right; only speech in the exported model is noise",
    ),
    Fault(
        "positions-not-reset",
        "usdm_megatron/data/batch.py",
        "position_ids = np.arange(size, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)",
        "position_ids = np.arange(size, dtype=np.int64) % seq_length",
        (_BRUTE_FORCE,),
        "RoPE is relative: in fp32 no logit shows it; in bf16 large angles cost precision late in a row",
    ),
    Fault(
        "mean-of-means",
        "usdm_megatron/train/step.py",
        "share = total / targets",
        "share = total / mask_S.sum().clamp(min=1) / replicas",
        (f"{_INVARIANCE}[1x1x1-2]", f"{_GRADIENTS}[1x1x1]"),
        "the loss is a mean all the same, but depends on micro-batch and DP size",
    ),
    Fault(
        "mean-of-means-by-recipe",
        "usdm_megatron/recipes.py",
        '("micro-batch-mean", "token-mean")',
        '("micro-batch-mean", "micro-batch-mean")',
        (f"{_INVARIANCE}[1x1x1-2]",),
        "the same by the table of recipes",
    ),
    Fault(
        "a-stage-without-its-cu-seqlens",
        "usdm_megatron/train/step.py",
        "packed_seq_params=self._rope.pack(batch, self._dtype)",
        "packed_seq_params=self._rope.pack(batch if self._groups.coordinates.pp != 1 else "
        'type(batch)(**{**vars(batch), "segment_lengths": (batch.tokens.numel(),)}), self._dtype)',
        (f"{_GRADIENTS}[1x3x1]",),
        "isolation holds on the first and the last stage; quality falls (Megatron-LM#4092)",
    ),
    Fault(
        "a-stage-without-its-cu-seqlens-in-verify",
        "usdm_megatron/model/logits.py",
        "packed_seq_params=rope.pack(batch, dtype)",
        "packed_seq_params=rope.pack(batch if chunk.decoder.layers[0].layer_number == 1 else "
        'type(batch)(**{**vars(batch), "segment_lengths": (batch.tokens.numel(),)}), dtype)',
        (f"{_LOGITS}[1x2x1]", f"{_ISOLATION}[1x3x1]"),
        "the same where logits are made for verification",
    ),
    Fault(
        "sharded-weights-not-marked",
        "usdm_megatron/model/build.py",
        "        _mark_sharded_weights(model)\n",
        "",
        (f"{_GRADIENTS}[2x1x1]", f"{_INVARIANCE}[2x1x1-1]"),
        "gradients are right; their norm counts the shards of one rank, so clipping clips less (seen here)",
    ),
    Fault(
        "outputs-freed-while-gloo-sends",
        "usdm_megatron/model/architecture.py",
        "return parallel.num_virtual_stages_per_pipeline_rank == 1 or",
        "return True or",
        ("tests/training/test_faults_caught.py::test_outputs_are_not_freed_while_they_are_sent",),
        "a race: another wrong loss every run, no error (seen here, interleaved pipelines on CPU)",
    ),
    Fault(
        "targets-counted-across-samples",
        "usdm_megatron/data/step_work.py",
        "len(rows) if self._train_sample_boundaries else samples",
        "len(rows)",
        (f"{_CORRECTED}[1x1x1]",),
        "`corrected` divides by targets that carry no loss: loss and gradient a little too small",
    ),
    Fault(
        "clipping-off",
        "usdm_megatron/train/optimizer.py",
        "if limit > 0 and gradient_norm > limit",
        "if limit < 0",
        (f"{_CORRECTED}[1x1x1]",),
        "nothing but a spike needs it, weeks later",
    ),
    Fault(
        "norms-decayed",
        "usdm_megatron/train/optimizer.py",
        '{"wd_mult": 0.0}',
        '{"wd_mult": 1.0}',
        (f"{_CORRECTED}[1x1x1]",),
        "`corrected` promises norms without weight decay; the loss does not show it for long",
    ),
    Fault(
        "saved-before-the-gather",
        "usdm_megatron/train/run_checkpoint.py",
        "        self._optimizer.finish_update()\n",
        "",
        (f"{_CORRECTED.split('::')[0]}::{_LATE_GATHER}",),
        "with --overlap-param-gather a save misses the last update of the other replicas' shards (seen here)",
    ),
)


def apply_fault(fault: Fault, root: Path) -> None:
    """Edit the copy at `root`; raises `ValueError` unless the text occurs exactly once."""
    path = root / fault.file
    content = path.read_text(encoding="utf-8")
    if (found := content.count(fault.old)) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} occurs {found} times in {fault.file}, expected 1")
    path.write_text(content.replace(fault.old, fault.new), encoding="utf-8")


def markdown() -> str:
    """The table of `tests/faults.md`."""
    rows = ["| fault | file | caught by | why it is silent otherwise |", "| --- | --- | --- | --- |"]
    for fault in FAULTS:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in fault.tests)
        rows.append(f"| {fault.name} | `{fault.file}` | {tests} | {fault.why} |")
    return "\n".join(rows) + "\n"


def copy_repository(source_root: Path, target: Path) -> Path:
    """What the tests need, without caches; returns `target`."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    for name in ("usdm_megatron", "tests"):
        shutil.copytree(source_root / name, target / name, ignore=ignore)
    shutil.copy2(source_root / "pyproject.toml", target)
    return target


@dataclass(frozen=True)
class TestRun:
    """`outcomes` by node id: "" for a pass, otherwise what pytest says of the failure."""

    outcomes: dict[str, str]
    output: str
    seconds: float


def run_tests(root: Path, tests: Sequence[str], timeout_s: float) -> TestRun:
    """Run these node ids in the copy at `root`, which is what gets imported, in ranks too."""
    report = root / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    started_at = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, text=True, timeout=timeout_s, capture_output=True
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        output = f"no end after {timeout_s:.0f} s"
    outcomes = _outcomes(report) if report.exists() else {}
    return TestRun(outcomes, output, time.perf_counter() - started_at)


def _outcomes(report: Path) -> dict[str, str]:
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [*case.findall("failure"), *case.findall("error"), *case.findall("skipped")]
        node = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "")
        outcomes[node] = "\n".join(f"{p.tag}: {p.get('message')}\n{p.text}" for p in problems)
    return outcomes


def verdict(fault: Fault, run: TestRun) -> str:
    """`caught`, or why not."""
    for test in fault.tests:
        if test not in run.outcomes:
            return f"BROKEN: {test} did not run: {run.output[-300:]}"
        outcome = run.outcomes[test]
        if not outcome:
            return f"SURVIVED {test}"
        asserted = outcome.startswith("failure:") and re.search(r"\bassert\b|AssertionError", outcome)
        if not asserted or re.search(r"rank \d+ of \d+ failed|ranks died|did not finish in time", outcome):
            return f"BROKEN: {test} crashed instead of failing: {outcome[:600]}"
    return "caught"


def check_baseline(faults: Sequence[Fault], root: Path) -> bool:
    """Whether all named tests pass in the copy at `root`, without a fault."""
    tests = sorted({test for fault in faults for test in fault.tests})
    run = run_tests(root, tests, BASELINE_TIMEOUT_S)
    failed = [test for test in tests if run.outcomes.get(test, "did not run")]
    passed = len(tests) - len(failed)
    print(f"{passed} of {len(tests)} named tests pass without a fault ({run.seconds:.0f} s)\n")
    if failed:
        print(run.output[-4000:], *failed, "they must pass before they can catch a fault", sep="\n")
    return not failed


def inject(fault: Fault, snapshot: Path) -> bool:
    """Run one fault in a copy of `snapshot`, print a row; whether it was caught."""
    root = copy_repository(snapshot, snapshot.parent / fault.name)
    apply_fault(fault, root)
    run = run_tests(root, fault.tests, FAULT_TIMEOUT_S)
    shutil.rmtree(root)
    result = verdict(fault, run)
    print(f"| {fault.name:<40} | {len(fault.tests):>5} | {run.seconds:3.0f} s | {result} |", flush=True)
    return result == "caught"


def inject_all(faults: Sequence[Fault]) -> int:
    """The exit code of the whole run; one snapshot, so that edits meanwhile change nothing."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        snapshot = copy_repository(REPOSITORY, Path(directory) / "unmutated")
        if not check_baseline(faults, snapshot):
            return 1
        print(
            f"| {'fault':<40} | tests |  time | result |\n| {'-' * 40} | ----- | ----- | ------ |", flush=True
        )
        missed = [fault.name for fault in faults if not inject(fault, snapshot)]
    print(f"\n{len(faults) - len(missed)} of {len(faults)} faults caught", *missed, sep="\nnot caught: ")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--markdown", action="store_true", help="print the table of tests/faults.md and stop")
    options = parser.parse_args()
    if options.list or options.markdown:
        names = "".join(f"{fault.name:<42} {fault.why}\n" for fault in FAULTS)
        print(markdown() if options.markdown else names, end="")
        return 0
    return inject_all([fault for fault in FAULTS if not options.only or fault.name in options.only])


if __name__ == "__main__":
    sys.exit(main())
