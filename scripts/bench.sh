#!/usr/bin/env bash
# Every benchmark that needs no GPU, each with its peers in the same process; figures: docs/benchmarks/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh dev
export PYTHONWARNINGS=ignore # upstream, while it is imported

for window in None 128; do
    "$PYTHON" benchmarks/attention_cpu.py --window "$window"
done
"$PYTHON" benchmarks/attention_cpu.py --tokens 4096 --shortest 3000 --longest 4000 --window 512 --repeats 3
"$PYTHON" benchmarks/attention_cpu.py --dtype bf16
"$PYTHON" benchmarks/redirect.py
for samples in 100000 10000000; do # 1,000,000 are in data.py; beside the original's multipack where numba is installed: .[bench]
    "$PYTHON" benchmarks/packing.py --samples "$samples"
done
"$PYTHON" benchmarks/data.py --tokens 100000000 # 3 GB of disk
"$PYTHON" -m benchmarks.memory
for micro_batch in 2 8; do
    "$PYTHON" benchmarks/sft.py --micro-batch "$micro_batch"
done
