"""The PyTorch backend's private modules, as far as H2O's adapters use them: the strict ones of `fakes.trtllm_kv`.

`FAKE_TRTLLM_WITHOUT`, a "module:attribute.path", names what this release does not have.
"""

from __future__ import annotations

import os
import sys
import types
from functools import reduce

from fakes.trtllm_kv import v12, v13

import tensorrt_llm

_PREFIX = f"{__name__}."
_contents = (v12 if tensorrt_llm.__version__.startswith("1.2") else v13).modules()
for _name, _attributes in sorted(_contents.items()):
    if _name.startswith(_PREFIX):
        _module = types.ModuleType(_name)
        _module.__path__ = []
        vars(_module).update(_attributes)
        sys.modules[_name] = _module
        _parent, _, _child = _name.rpartition(".")
        setattr(sys.modules[_parent], _child, _module)

_module_name, _, _path = os.environ.get("FAKE_TRTLLM_WITHOUT", "").partition(":")
if _path:
    *_parents, _last = _path.split(".")
    delattr(reduce(getattr, _parents, sys.modules[_module_name]), _last)
