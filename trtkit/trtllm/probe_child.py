"""What the installed TensorRT-LLM has, told by a process of its own: `python -m trtkit.trtllm.probe_child [FUNCTION]`.

Importing TensorRT-LLM takes half a minute, starts MPI, may hang and prints on standard output, so nobody imports it to
have a look. The answer is the one line that begins with `ANSWER`. With `module:function` it is what that function returns, a
list of dataclasses: a plugin's own probe.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Sequence
from typing import Any

ANSWER = "TRTKIT-PROBE "

NAMES = (
    "tensorrt_llm.LLM",
    "tensorrt_llm._tensorrt_engine.LLM",
    "tensorrt_llm.llmapi.llm_args.TrtLlmArgs",
    "tensorrt_llm.llmapi.llm_args.TorchLlmArgs",
    "tensorrt_llm.llmapi.SamplingParams",
    "tensorrt_llm.llmapi.KvCacheConfig",
    "tensorrt_llm.llmapi.SchedulerConfig",
    "tensorrt_llm.llmapi.CapacitySchedulerPolicy",
    "tensorrt_llm.llmapi.ExtendedRuntimePerfKnobConfig",
    "tensorrt_llm.llmapi.NGramDecodingConfig",
    "tensorrt_llm.quantization.functional.preprocess_weights_for_mixed_gemm",
    "mpi4py.MPI",
)
"""Everything that trtkit's builds and runtimes touch, by dotted name."""


def probe(names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Version, and for each name its arguments (None: it does not exist, or takes none that can be read)."""
    try:
        package = importlib.import_module("tensorrt_llm")
    except Exception as error:  # noqa: BLE001 - whatever its import raises is the answer
        return {"version": None, "error": f"{type(error).__name__}: {error}".splitlines()[0], "names": {}}
    found = {}
    for name in names:
        exists, arguments = look_up(name)
        if exists:
            found[name] = arguments
    return {"version": getattr(package, "__version__", None), "error": "", "names": found}


def look_up(name: str) -> tuple[bool, list[str] | None]:
    """Whether a dotted name exists, and the arguments it takes."""
    module, _, attribute = name.rpartition(".")
    try:
        thing = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        try:
            importlib.import_module(name)
        except ImportError:
            return False, None
        return True, None
    return True, _arguments(thing)


def _arguments(thing: Any) -> list[str] | None:  # noqa: ANN401 - anything a library exports
    fields = getattr(thing, "model_fields", None)
    if isinstance(fields, dict):
        return sorted(fields)
    if dataclasses.is_dataclass(thing):
        return sorted(field.name for field in dataclasses.fields(thing))
    try:
        return sorted(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return None


def answer(arguments: Sequence[str]) -> object:
    """The probe's, or a plugin's."""
    if not arguments:
        return probe()
    module, _, function = arguments[0].partition(":")
    return [dataclasses.asdict(finding) for finding in getattr(importlib.import_module(module), function)()]


if __name__ == "__main__":
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer(sys.argv[1:]))}\n")
    sys.stdout.flush()
