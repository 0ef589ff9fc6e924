"""Triton kernels with a torch twin each; the twin is the specification."""
