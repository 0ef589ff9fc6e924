# ruff: noqa: RUF012
"""The argument models behind `LLM(**kwargs)`."""

from __future__ import annotations

from tensorrt_llm.llmapi import Strict
from tensorrt_llm.llmapi._llm import VERSION, EngineLLM, TorchLLM


class TorchLlmArgs(Strict):
    FIELDS = {"model": (None, (object,)), **TorchLLM.FIELDS}


if VERSION.startswith("1.2"):

    class TrtLlmArgs(Strict):
        FIELDS = {"model": (None, (object,)), **EngineLLM.FIELDS}
