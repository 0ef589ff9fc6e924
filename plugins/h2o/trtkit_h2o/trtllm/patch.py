"""Putting our answer in front of one of TensorRT-LLM's functions, everywhere it was imported to by value."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_trtkit_h2o_original"


def route(home: ModuleType, name: str, ours: Callable[[Any], bool], answer: Callable[..., Any]) -> list[str]:
    """Let `answer` take the calls of `home.name` whose first argument is ours.

    Every loaded module of TensorRT-LLM that holds the function is changed; one loaded later imports the changed one.

    Returns:
        Where the routed function stands now, as "module.name", sorted.
    """
    current = getattr(home, name)
    original = getattr(current, _MARK, current)
    replacement = current if current is not original else _in_front_of(original, ours, answer)
    for module in _holders(name, original):
        setattr(module, name, replacement)
    return sorted(f"{module.__name__}.{name}" for module in _holders(name, replacement))


def _in_front_of(original: Callable[..., Any], ours: Callable[[Any], bool], answer: Callable[..., Any]) -> Any:  # noqa: ANN401
    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        first = args[0] if args else next(iter(kwargs.values()), None)
        return answer(*args, **kwargs) if ours(first) else original(*args, **kwargs)

    setattr(routed, _MARK, original)
    return routed


def _holders(name: str, function: object) -> list[ModuleType]:
    loaded = [module for key, module in list(sys.modules.items()) if key.split(".")[0] == "tensorrt_llm"]
    return [module for module in loaded if getattr(module, name, None) is function]
