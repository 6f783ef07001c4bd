#!/usr/bin/env python
"""Turn corpora, dialogs and token ids into token stores; see `--help`. Works from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # the workers import this file too, and need none of what parses a command line
    from usdm_megatron.cli.entry import run_guarded
    from usdm_megatron.cli.preprocess import main

    sys.exit(run_guarded(main, sys.argv[1:]))
