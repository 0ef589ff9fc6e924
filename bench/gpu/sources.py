"""Run trtkit straight from its source tree: no installation, H2O and the other policies found all the same.

    export PYTHONPATH="$(python3 bench/gpu/sources.py DIRECTORY)"

Policies are found through entry points, which only an installed package has. Where it is not installed, a metadata folder
made from pyproject.toml stands in for it in DIRECTORY (a temporary one, outside the tree).
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins" / "h2o"
_START_TICKS = 19
"""Place of `starttime` behind the name of the command in /proc/PID/stat (proc(5))."""
_OLDEST_S = 3600.0
_GROUPS = ("trtkit.kv_policies", "trtkit.trtllm_policies", "trtkit.trtllm_probes")


def python_path(directory: Path) -> str:
    """The PYTHONPATH of every process: the tree, the plugin, and the stand-in for the metadata where it is needed."""
    parts = [str(ROOT), str(PLUGINS)]
    if not importlib.metadata.entry_points(group=_GROUPS[0]):
        parts.append(str(write_metadata(directory)))
    before = os.environ.get("PYTHONPATH", "")
    parts += [part for part in before.split(os.pathsep) if part and part not in parts]
    return os.pathsep.join(parts)


def write_metadata(directory: Path) -> Path:
    """A `dist-info` folder with pyproject's entry points and nothing else; returns the folder to put on the path."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = directory / "trtkit_source-0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for group in _GROUPS:
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in project["entry-points"][group].items()), ""]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: trtkit-source\nVersion: 0\n", encoding="utf-8")
    (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory


def use(directory: Path) -> None:
    """Make this process and its children import from the tree.

    This folder leaves the path: a `kernels.py` there must not pose as the package of that name.
    """
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [part for part in sys.path if part != here]
    path = python_path(directory)
    os.environ["PYTHONPATH"] = path
    for part in reversed(path.split(os.pathsep)):
        if part not in sys.path:
            sys.path.insert(0, part)


def began_s() -> float:
    """When this process began, on `time.monotonic`; now, where the system does not tell.

    The first import of torch on a fresh machine takes long, and a time limit must count it. A process that replaced
    itself (`os.execv`) began when its predecessor did.
    """
    now_s = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now_s
    return now_s - age_s if 0 <= age_s <= _OLDEST_S else now_s


if __name__ == "__main__":
    print(python_path(Path(sys.argv[1])))
