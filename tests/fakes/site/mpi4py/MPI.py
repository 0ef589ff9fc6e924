# ruff: noqa: N999
"""MPI for Python is importable; nothing here talks MPI."""
