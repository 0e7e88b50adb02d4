"""2:4 kernels in Triton: one packed layout, read sparse and computed dense.

``layout`` is pure torch. The modules that hold kernels import Triton; ``backend`` and ``ops`` import them
only when a kernel is launched, so that this package imports where Triton does not.
"""
