# ruff: noqa: RUF012
"""The argument models behind `LLM(**kwargs)`."""

from __future__ import annotations

import types
from typing import Any

from tensorrt_llm.llmapi import Strict
from tensorrt_llm.llmapi._llm import VERSION, EngineLLM
from tensorrt_llm.llmapi._paged import LLM

_OLD = VERSION.startswith("1.2")
_CONFIGS = ("RocketSparseAttentionConfig",) if _OLD else ("KvCacheCompressionConfig",)


class TorchLlmArgs(Strict):
    FIELDS = {"model": (None, (object,)), **LLM.FIELDS}

    @classmethod
    def model_rebuild(cls, *, force: bool) -> None:
        assert force


if _OLD:

    class TrtLlmArgs(Strict):
        FIELDS = {"model": (None, (object,)), **EngineLLM.FIELDS}
else:
    TorchLlmArgs.model_fields["kv_cache_compression_config"] = types.SimpleNamespace(annotation=type(None))


def __getattr__(name: str) -> Any:
    """pydantic's models come with torch, which most who look in here do without."""
    if name in _CONFIGS:
        from fakes.trtllm_kv import v12, v13

        return getattr(v12 if _OLD else v13, name)
    raise AttributeError(name)
