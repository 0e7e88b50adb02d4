"""The quality table: every method on one base model, with several seeds and equal budgets."""
