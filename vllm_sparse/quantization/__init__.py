"""What vLLM calls: the config that claims 2:4 checkpoints, and the linear methods behind it."""
