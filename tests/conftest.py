"""What every test process shares: one thread each, and generated examples that do not depend on the machine."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# pytest-xdist's workers would otherwise wait for each other at every matrix product.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is slow, which is no failure, and one commit gives one set of examples.
# `pytest --hypothesis-profile search` looks for new ones.
settings.register_profile(
    "same", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")
