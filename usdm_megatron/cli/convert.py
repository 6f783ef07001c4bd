"""`tools/convert_hf_checkpoint.py` and `usdm-megatron convert`: flags of the converter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.errors import EXIT_DONE, CheckpointFault

Command = (
    Annotated[ImportOptions, tyro.conf.subcommand("import")]
    | Annotated[ExportOptions, tyro.conf.subcommand("export")]
    | Annotated[VerifyOptions, tyro.conf.subcommand("verify")]
)


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
    except OSError as error:  # a disk that fills up meanwhile; what was written is gone already
        raise CheckpointFault(f"{error.filename or 'writing failed'}: {error.strerror or error}") from error


def _run(options: Command, argv: Sequence[str]) -> int:
    # torch takes seconds to import; --help and a wrong flag must not wait for it
    match options:
        case ImportOptions():
            return _import(options)
        case ExportOptions():
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
