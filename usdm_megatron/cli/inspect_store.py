"""`usdm-megatron inspect store P [--verify] [--grammar] [--json] [--plot P.png]`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from usdm_megatron.data.example_row import TextDecoder
from usdm_megatron.data.inspect_store import describe, inspect_store
from usdm_megatron.data.store_plot import check_plot, write_plot
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import ConfigError, DataError


@dataclass(frozen=True)
class InspectStoreFlags:
    """Print what a token store holds."""

    prefix: tyro.conf.Positional[str]
    """The store: PREFIX.bin, PREFIX.idx, PREFIX.json."""
    verify: bool = False
    """Read every byte and compare with the recorded checksums first."""
    grammar: bool = False
    """Check every sample against USDM's token grammar; exit code 2 when one breaks it."""
    offences: int = 10
    """How many of the first offences against the grammar are listed."""
    row: int | None = None
    """The example row, counted from 0 and shown whole (default: the beginning of row 0)."""
    tokenizer: Path | None = None
    """Directory of the tokenizer that the store was made with: text is shown as text, not as ids."""
    json: bool = False
    """Print one JSON object, with the whole example row."""
    plot: Path | None = None
    """Draw lengths, kinds and patterns into this .png (needs matplotlib, extra `plot`)."""

    def __post_init__(self) -> None:
        if self.offences < 0:
            raise ConfigError(f"--offences is {self.offences}, the least is 0")


def main(argv: Sequence[str]) -> int | None:
    """Print the report of one store; a `DataError` after it where the grammar is broken."""
    flags = tyro.cli(InspectStoreFlags, args=list(argv), prog="usdm-megatron inspect store")
    if flags.plot:
        check_plot(flags.plot)
    store = TokenStore.open(flags.prefix)
    report = inspect_store(
        store,
        row_id=flags.row or 0,
        decoder=TextDecoder(flags.tokenizer, store.summary) if flags.tokenizer else None,
        verify=flags.verify,
        grammar=flags.grammar,
        listed=flags.offences,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # text of any script, for a terminal of any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if flags.json:
        print(json.dumps(report.to_record(), indent=1))
    else:
        print("\n".join(describe(report, whole_row=flags.row is not None)))
    if flags.plot:
        write_plot(report, flags.plot)
    if report.grammar and report.grammar.offences:
        raise DataError(
            f"{flags.prefix}: {report.grammar.offending_rows} of {store.rows} rows break USDM's token "
            "grammar; mend the input and preprocess it again"
        )
    return None
