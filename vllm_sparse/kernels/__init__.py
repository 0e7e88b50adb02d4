"""Kernel backends for 2:4 linear layers, and the dispatch between them."""
