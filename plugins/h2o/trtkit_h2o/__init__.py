"""H2O: heavy-hitter KV eviction as a trtkit policy."""
