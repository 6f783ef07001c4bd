"""From samples and rows to token stores: parts, workers, packing, merging."""
