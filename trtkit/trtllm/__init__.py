"""The only place that knows TensorRT-LLM: checkpoint conversion, builds, runtimes."""
