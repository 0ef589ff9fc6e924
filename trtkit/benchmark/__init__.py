"""Measure any `Engine`: load, driver, metrics, environment, memory sampling, statistics."""
