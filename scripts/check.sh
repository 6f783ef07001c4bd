#!/usr/bin/env bash
# The static checks, and the tests that start no ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev

run() {
    printf '== %s\n' "$*"
    "$PYTHON" -m "$@"
}
run ruff format --check .
run ruff check .
run mypy
lint-imports --no-cache
run bandit -q -r usdm_megatron tools
