#!/usr/bin/env python3
"""Convert between Hugging Face models and torch_dist checkpoints; works from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usdm_megatron.cli.convert import main  # noqa: E402
from usdm_megatron.cli.entry import run_guarded  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))
