"""Pruned checkpoints in, vLLM-loadable weights out."""
