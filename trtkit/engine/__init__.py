"""The embedded engine: paged KV cache, continuous batching, INT8 weight-only, eviction. One process, one device."""
