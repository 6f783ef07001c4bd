#!/usr/bin/env python
"""Turn corpora, dialogs and token ids into token stores; see `--help`. Works from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usdm_megatron.cli.entry import run_guarded  # noqa: E402
from usdm_megatron.cli.preprocess import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
