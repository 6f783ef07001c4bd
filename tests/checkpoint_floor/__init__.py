"""Checkpoints on disk: integrity, commit protocol, which one is taken, torch_dist at several layouts."""
