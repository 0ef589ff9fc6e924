"""What to keep: eviction policies, selections and the attention-mass ledger. Knows nothing of pages or models."""
