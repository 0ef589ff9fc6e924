"""The engine's path for a GPU: static buffers, captured decode steps, nothing that waits for the device."""
