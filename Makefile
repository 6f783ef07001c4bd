# Thin names for the scripts; `make check PYTHON=…` is not a thing: scripts/setup.sh picks the environment.
.PHONY: test test-full check bench

test:
	bash scripts/test.sh

test-full:
	bash scripts/test.sh --full

check:
	bash scripts/check.sh

bench:
	bash scripts/bench.sh
