"""MPI for Python is importable; nothing here talks MPI."""
