# ruff: noqa: T201, E402
"""A strict stand-in for TensorRT-LLM: the part of its Python API that trtkit calls, computed by the embedded engine.

It refuses whatever the real package is stated to refuse: unknown arguments, names a version does not have, limits
beyond the engine's, other element types. `FAKE_TRTLLM_VERSION` chooses 1.2.1 (default; both backends) or 1.3.0.
"""

from __future__ import annotations

import os
import sys

__version__ = os.environ.get("FAKE_TRTLLM_VERSION", "1.2.1")
print(f"[TensorRT-LLM] TensorRT-LLM version: {__version__}")  # the real one talks on standard output too
if os.environ.get("FAKE_TRTLLM_HANG") == "import":
    import time

    time.sleep(3600)

from tensorrt_llm.llmapi import KvCacheConfig, SamplingParams
from tensorrt_llm.llmapi._paged import LLM

if not __version__.startswith("1.2"):
    sys.modules["tensorrt_llm._tensorrt_engine"] = None  # engines are gone: importing it raises ImportError

__all__ = ["LLM", "KvCacheConfig", "SamplingParams", "__version__"]
