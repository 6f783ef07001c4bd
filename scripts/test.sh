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
exec "$PYTHON" -m pytest -q -m "$selection" --durations=10 "$@"
