"""Compression algorithms and the small-model training they are judged on."""
