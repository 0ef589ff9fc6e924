"""`trtkit eval` for real: a bundle in a child process, the shipped tasks, killed and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkpoints import write_bundle
from support.engine_models import make_hf, spec_of, trtllm_tensors

from trtkit.report.records import load_records
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

pytestmark = pytest.mark.slow

TOKENIZER = Path(__file__).parents[2] / "bench" / "tiny_model" / "model"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random tiny model with a real tokenizer, with its whole cache and with a window of it."""
    hf = make_hf(vocab_size=512, max_position_embeddings=2048)
    root = tmp_path_factory.mktemp("builds")
    made = {}
    for name, policy in (("full", "full"), ("window", "window:budget=64,interval=16")):
        path = root / f"{name}.engine"
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / "tokenizer").mkdir(parents=True, exist_ok=True)
            shutil.copy(TOKENIZER / file, path / "tokenizer" / file)
        limits = Limits(max_batch_size=4, max_num_tokens=512, max_seq_len=1024, kv_memory_bytes=1 << 24)
        write_bundle(path, spec_of(hf), trtllm_tensors(hf), limits=limits, kv=parse_kv_policy(policy))
        made[name] = path
    return made


def arguments(output: Path, *engines: Path) -> list[str]:
    options = ["--tasks", "mini_mmlu", "--tasks-dir", "shipped", "--limit", "3", "-o", str(output), "--json"]
    return [sys.executable, "-m", "trtkit", "eval", *map(str, engines), *options]


def test_the_shipped_task_runs_on_both_engines_and_pairs(bundles: dict[str, Path], tmp_path: Path) -> None:
    run = subprocess.run(arguments(tmp_path, *bundles.values()), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    body = json.loads(run.stdout)
    assert {(r["engine"]["name"], r["metric"]) for r in body["records"]} == {
        (name, metric) for name in bundles for metric in ("acc", "gold_logprob")
    }
    records = {r.engine.name: r for r in load_records([tmp_path]).quality if r.metric == "acc"}
    assert [d.document for d in records["full"].documents] == [d.document for d in records["window"].documents]
    assert records["window"].valid
    assert records["window"].evictions > 0
    gate = [
        sys.executable,
        "-m",
        "trtkit",
        "gate",
        str(bundles["full"]),
        str(bundles["full"]),
        "--results",
        str(tmp_path),
    ]
    assert subprocess.run(gate, capture_output=True, check=False).returncode == 0


STOPPING_EVAL = """
import sys, time
from trtkit.quality.journal import Journal
real, count = Journal.put, 0
def put(self, key, value):
    global count
    real(self, key, value)
    count += 1
    if count == 4:
        time.sleep(600)
Journal.put = put
from trtkit.cli.app import main
sys.argv = ["trtkit", *sys.argv[1:]]
main()
"""


def test_a_killed_evaluation_goes_on_where_it_stopped(bundles: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPING_EVAL, *arguments(tmp_path, bundles["full"])[3:]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if any(len(j.read_bytes().splitlines()) == 4 for j in (tmp_path / "journal").glob("*.jsonl")):
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run = subprocess.run(arguments(tmp_path, bundles["full"]), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    checks = json.loads(run.stdout)["records"][0]["checks"]
    detail = next(c["detail"] for c in checks if c["name"] == "resumed")
    assert detail == "4 of 18 contexts were finished before"
