# Thin names for the scripts, which set up what is missing.
.PHONY: test test-full check bench

test:
	bash scripts/test.sh

test-full:
	bash scripts/test.sh --full

check:
	bash scripts/check.sh

bench:
	bash scripts/bench.sh
