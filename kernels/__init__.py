"""Kernels of head-wise adaptive block-sparse attention, and the two ops that compose them.

Each folder is one kernel: ``reference.py`` specifies it in plain traceable torch, ``kernel.py`` holds the
Triton kernel and its launcher; the two never import each other. ``ops.py`` defines the ``haste::`` ops and
needs torch alone: Triton is imported when an op first meets a CUDA tensor.
"""
