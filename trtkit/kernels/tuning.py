"""What Triton's autotuner has chosen in this process, and how to make it choose again.

A kernel is tuned once, on the first work it is given. A self-check gives it little, on which every choice looks alike.
"""

from __future__ import annotations

import sys

_MODULES = "trtkit.kernels.triton_"


def forget_choices() -> int:
    """Let every kernel be tuned again on its next launch; what is compiled stays compiled. Returns how many had chosen."""
    forgotten = 0
    for name, module in list(sys.modules.items()):
        if not name.startswith(_MODULES):
            continue
        for value in vars(module).values():
            chosen = getattr(value, "cache", None) if hasattr(value, "configs") else None
            if isinstance(chosen, dict) and chosen:
                chosen.clear()
                forgotten += 1
        # Decode attention keeps a list of its own of shapes that it has been tuned for on long sequences.
        remembered = getattr(vars(module).get("_tuned"), "cache_clear", None)
        if remembered is not None:
            remembered()
    return forgotten
