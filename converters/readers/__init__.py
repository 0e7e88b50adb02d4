"""One file per input format; each yields canonical tensors."""
