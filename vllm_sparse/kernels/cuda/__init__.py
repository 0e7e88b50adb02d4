"""2:4 kernels in CUDA C++ on sparse tensor cores, from the packed layout of the Triton kernels.

Optional: the library is compiled by ``python -m vllm_sparse.kernels.cuda.build`` and loaded if it is there.
Without it Triton's kernels serve, which read the same weights.
"""
