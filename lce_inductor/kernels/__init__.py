"""Triton kernels. Nothing here is imported before a kernel is needed: the package works without Triton."""
