# ruff: noqa: N814
"""The engine backend's `LLM`, in 1.2.x only."""

from tensorrt_llm.llmapi._llm import EngineLLM as LLM

__all__ = ["LLM"]
