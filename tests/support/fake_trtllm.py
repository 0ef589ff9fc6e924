"""The environment in which the fake TensorRT-LLM, its programs and its GPUs are found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FAKES = TESTS / "fakes"


def fake_environment(**knobs: str) -> dict[str, str]:
    """Variables to set: paths first, then the fakes' knobs (FAKE_GPUS, FAKE_TRTLLM_VERSION, ...).

    FAKE_OWNER tells the processes of this test run from those of one beside it.
    """
    path = os.pathsep.join([str(FAKES / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    python_path = os.pathsep.join(
        [str(FAKES / "site"), str(TESTS.parent), str(TESTS.parent / "plugins" / "h2o"), str(TESTS)]
    )
    return {"PATH": path, "PYTHONPATH": python_path, "FAKE_OWNER": str(os.getpid()), **knobs}
