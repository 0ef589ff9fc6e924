"""Is a number possible? Physics and bookkeeping checks on our records and on published tables."""
