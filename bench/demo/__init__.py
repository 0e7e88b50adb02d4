"""``make demo``: one model from dense to compressed to served to measured."""
