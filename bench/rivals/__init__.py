"""What a CPU user would run instead (vLLM's dense formats, llama.cpp) against 2:4 at the same precision."""
