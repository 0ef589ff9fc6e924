"""One thread per test process: pytest-xdist's workers would otherwise wait for each other at every matrix product."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
