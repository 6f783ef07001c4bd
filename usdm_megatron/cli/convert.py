"""`tools/convert_hf_checkpoint.py` and `usdm-megatron convert`: flags of the converter."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import tyro

from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.errors import EXIT_DONE, CheckpointFault, ConversionError

Command = (
    Annotated[ImportOptions, tyro.conf.subcommand("import")]
    | Annotated[ExportOptions, tyro.conf.subcommand("export")]
    | Annotated[VerifyOptions, tyro.conf.subcommand("verify")]
)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXIT_TERMINATED = 128 + signal.SIGTERM  # as shells report it


def main(argv: Sequence[str]) -> int | None:
    """Parse `argv`, convert or compare, print what was done."""
    options = tyro.cli(
        Command,
        args=list(argv),
        prog="convert_hf_checkpoint.py",
        description="Convert between Hugging Face models and torch_dist checkpoints.",
    )
    try:
        return _run(options, argv)
    except (OSError, CheckpointFault) as error:  # what was written is gone already
        failure = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(failure, OSError):
            raise
        raise _explained(options, failure) from error


def _explained(options: Command, failure: OSError) -> ConversionError:
    """What the file system refused, by the flag that helps: a disk that fills up, a name that is too long."""
    reason = failure.strerror or failure
    if failure.errno in _NO_ROOM and not isinstance(options, VerifyOptions):
        flag, target = (
            ("--save", options.save) if isinstance(options, ImportOptions) else ("--hf-path", options.hf_path)
        )
        return ConversionError(
            f"{flag} {target} cannot be written: {reason}; free some room there (or raise the quota), or "
            "choose another disk"
        )
    return ConversionError(f"{failure.filename or 'the conversion'}: {reason}")


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C, so that temporaries go; a scheduler sends it before it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: Command, argv: Sequence[str]) -> int:
    # torch takes seconds to import; --help and a wrong flag must not wait for it
    match options:
        case ImportOptions():
            with _cleaning_up_when_terminated():
                return _import(options)
        case ExportOptions():
            with _cleaning_up_when_terminated():
                return _export(options)
        case VerifyOptions():
            return _verify(options, argv)


def _import(options: ImportOptions) -> int:
    if options.adapter is not None:
        from usdm_megatron.convert.peft_import import dry_run
        from usdm_megatron.convert.peft_import import import_adapter as run
    else:
        from usdm_megatron.convert.import_hf import dry_run
        from usdm_megatron.convert.import_hf import run_import as run

    if options.dry_run:
        print(dry_run(options))
        return EXIT_DONE
    summary = run(options)
    _print_removed(summary.removed)
    if not summary.has_tokenizer:
        print("no tokenizer in the source: the checkpoint and its exports have none either")
    what = "new" if options.adapter is None else "of them trained"
    rows = f", {summary.new_rows:,} {what}" if summary.new_rows else ""
    print(
        f"{summary.path}: {summary.source_tensors} tensors mapped, {summary.model.layers} layers, "
        f"{summary.vocabulary.size:,} ids{rows}, {summary.weight_type}, {summary.size_bytes / 1e9:.2f} GB"
    )
    return EXIT_DONE


def _export(options: ExportOptions) -> int:
    if options.adapter_only:
        from usdm_megatron.convert.peft_export import dry_run
        from usdm_megatron.convert.peft_export import export_adapter as run
    else:
        from usdm_megatron.convert.export_hf import dry_run
        from usdm_megatron.convert.export_hf import run_export as run

    if options.dry_run:
        print(dry_run(options))
        return EXIT_DONE
    summary = run(options)
    _print_removed(summary.removed)
    files = "1 file" if len(summary.files) == 1 else f"{len(summary.files)} files"
    print(
        f"{summary.path}: from {summary.checkpoint}, {summary.tensors} tensors in {files}, "
        f"{summary.weight_type}, {summary.size_bytes / 1e9:.2f} GB"
    )
    return EXIT_DONE


def _print_removed(names: Sequence[str]) -> None:
    for name in names:
        print(f"removed {name}, which an interrupted conversion had left")


def _verify(options: VerifyOptions, argv: Sequence[str]) -> int:
    if options.mode == "weights":
        from usdm_megatron.convert.verify_weights import compare_weights

        print(compare_weights(options).describe())
        return EXIT_DONE
    from usdm_megatron.runtime.ranks import RankEnvironment, ranks_from_environment, started_by_torchrun

    ranks = options.tensor_model_parallel_size * options.pipeline_model_parallel_size
    if ranks > 1 and not started_by_torchrun():
        from usdm_megatron.convert.hub import locate
        from usdm_megatron.runtime.launch import launch_local_ranks

        # a model of the hub is downloaded here: ranks that wait for one of them have a timeout
        locate(options.hf_path, options.hf_revision, options.hf_cache_dir)

        return launch_local_ranks("usdm_megatron.cli", ["convert", *argv], ranks)
    from usdm_megatron.convert.verify import run_verify_logits

    environment = ranks_from_environment() if ranks > 1 else None
    return run_verify_logits(options, environment or RankEnvironment())
