"""The only scaling constants, and how quantities are printed.

Memory is counted in GiB (2**30 bytes) and traffic in GB (10**9 bytes); the two never mix.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
MB = 10**6
GB = 10**9
TERA = 10**12
MILLION = 10**6
NS_PER_MS = 10**6
NS_PER_S = 10**9
MS_PER_S = 10**3
SECONDS_PER_HOUR = 3600
HOURS_PER_MONTH = 730


def format_gib(num_bytes: float) -> str:
    """`num_bytes` as GiB, with MiB or KiB for small amounts."""
    for scale, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(count: float) -> str:
    """A count with thousands separators, or in millions and billions when large."""
    if abs(count) >= 10**9:
        return f"{count / 10**9:.2f}B"
    if abs(count) >= 10**6:
        return f"{count / 10**6:.2f}M"
    return f"{count:,.0f}"
