"""Megatron-style tensor / pipeline / data parallel trainer for the Unified Spoken Dialog Model."""

__version__ = "0.1.0"
