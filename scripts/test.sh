#!/usr/bin/env bash
# Sets up what is missing and runs the tests.
#
#   bash scripts/test.sh [pytest arguments]          every test that needs no GPU, a covering set of layouts
#   bash scripts/test.sh --full [pytest arguments]   every layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

selection="not exhaustive and not gpu"
if [ "${1:-}" = "--full" ]; then
    selection="not gpu"
    shift
fi
# Two files at a time: a test's ranks spend much of their time on waiting for each other.
exec "$PYTHON" -m pytest -q -m "$selection" --numprocesses 2 --dist loadfile --durations=25 "$@"
