"""Name -> opener. The one place that knows which targets exist; each is imported when it is opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from trtkit.spec.bundle import open_bundle
from trtkit.spec.engine import Engine
from trtkit.spec.errors import UnsupportedError

OPENERS: dict[str, str] = {
    "embedded": "trtkit.engine.open:open_embedded",
    "tensorrt": "trtkit.trtllm.open:open_tensorrt",
    "pytorch": "trtkit.trtllm.open:open_pytorch",
}
"""Target -> "module:function"; the function takes the bundle and keyword overrides, and returns an `Engine`."""


def open_engine(path: str | Path, /, *, isolated: bool = False, **overrides: object) -> Engine:
    """Open an engine bundle.

    Args:
        path: a `<name>.engine` directory.
        isolated: run it in a fresh child process; this one never imports the target's libraries. TensorRT-LLM always
            gets one: it starts MPI, and what kills it must not kill its user.
        **overrides: limits that replace the plan's at run time (`max_batch_size`, `max_num_tokens`, `max_seq_len`,
            `kv_memory_bytes`, `device`, `kv`, `speculation` as text).

    Raises:
        EngineError: the bundle is unfinished or damaged.
        UnsupportedError: this build of trtkit has no such target.
    """
    bundle = open_bundle(Path(path))
    if isolated or bundle.manifest.plan.target in ("tensorrt", "pytorch"):
        from trtkit.backends.remote import RemoteEngine

        return RemoteEngine(bundle.path, overrides)
    return open_here(path, **overrides)


def open_here(path: str | Path, /, **overrides: object) -> Engine:
    """Open a bundle in this very process, whatever its target; what the engine's child process calls.

    Raises:
        EngineError: the bundle is unfinished or damaged.
        UnsupportedError: this build of trtkit has no such target.
    """
    bundle = open_bundle(Path(path))
    target = bundle.manifest.plan.target
    if target not in OPENERS:
        raise UnsupportedError(f"{path}: target {target!r} cannot be opened here; known are {', '.join(OPENERS)}")
    module, _, function = OPENERS[target].partition(":")
    opener: Callable[..., Engine] = getattr(importlib.import_module(module), function)
    return opener(bundle, **overrides)
