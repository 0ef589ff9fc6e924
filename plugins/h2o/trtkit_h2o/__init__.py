"""H2O: heavy-hitter KV eviction as a trtkit policy."""

from trtkit_h2o.policy import DECAY, DEFAULT_SCORER, H2O, SCORERS

__all__ = ["DECAY", "DEFAULT_SCORER", "H2O", "SCORERS"]
