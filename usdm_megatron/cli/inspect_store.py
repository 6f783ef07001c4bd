"""`usdm-megatron inspect store P [--verify]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from usdm_megatron.data.inspect_store import count_tokens, describe
from usdm_megatron.data.token_store import TokenStore


@dataclass(frozen=True)
class InspectStoreFlags:
    """Print what a token store holds."""

    prefix: tyro.conf.Positional[str]
    """The store: PREFIX.bin, PREFIX.idx, PREFIX.json."""
    verify: bool = False
    """Read every byte and compare with the recorded checksums first."""


def main(argv: Sequence[str]) -> int | None:
    """Open (and with --verify, verify) a store and print its figures."""
    flags = tyro.cli(InspectStoreFlags, args=list(argv), prog="usdm-megatron inspect store")
    store = TokenStore.open(flags.prefix)
    if flags.verify:
        store.verify()
    print("\n".join(describe(store, count_tokens(store))))
    if flags.verify:
        print("  verified     every byte matches its checksum, every id is in the vocabulary")
    return None
