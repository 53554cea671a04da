"""Kernels in Triton for the cascades of the one IR."""
