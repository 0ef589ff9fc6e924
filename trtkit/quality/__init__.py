"""Judge any `Scorer` or `Engine`: tasks, drift, paired statistics, gates."""
