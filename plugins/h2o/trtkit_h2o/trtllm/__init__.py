"""H2O inside TensorRT-LLM's own paged KV cache. Nothing here imports TensorRT-LLM before `install` is called.

`session` does the work on plain tensors; `v12` and `v13` connect it to TensorRT-LLM 1.2.x and to the compression
managers that came after; `probe` says which of the two this box allows. None of it has run on a real TensorRT-LLM yet.
"""

from trtkit_h2o.trtllm.adapter import ADAPTER
from trtkit_h2o.trtllm.engine_backend import WindowLowering, lower_for_engine
from trtkit_h2o.trtllm.install import doctor_findings, h2o_llm_arguments, install
from trtkit_h2o.trtllm.probe import Finding, probe_h2o, usable_path

__all__ = [
    "ADAPTER",
    "Finding",
    "WindowLowering",
    "doctor_findings",
    "h2o_llm_arguments",
    "install",
    "lower_for_engine",
    "probe_h2o",
    "usable_path",
]
