"""trtkit: make serving Llama-class models on TensorRT-LLM cheap, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtkit.version import __version__

if TYPE_CHECKING:
    from trtkit.backends import open_engine

__all__ = ["__version__", "open_engine"]


def __getattr__(name: str) -> object:
    """Import the engine only when it is asked for, so that `trtkit --help` stays fast."""
    if name == "open_engine":
        from trtkit.backends import open_engine

        return open_engine
    raise AttributeError(f"module 'trtkit' has no attribute {name!r}")
