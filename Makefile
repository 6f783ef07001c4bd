# Thin names for the scripts, which set up what is missing.
.PHONY: test test-full test-oldest check bench

test:
	bash scripts/test.sh

test-full:
	bash scripts/test.sh --full

test-oldest:
	bash scripts/test_oldest.sh

check:
	bash scripts/check.sh

bench:
	bash scripts/bench.sh
