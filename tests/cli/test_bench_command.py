"""`trtkit bench` over the scripted engine in real child processes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fake_engine import FakeScript, fake_bundle
from typer.testing import CliRunner, Result

from trtkit.benchmark.run import Settings
from trtkit.cli import bench_run
from trtkit.cli.app import build_app

TESTS = Path(__file__).parents[1]
Bench = Callable[..., Result]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run the command on small loads; engines come from `fake_bundle`."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.chdir(tmp_path)
    settings = functools.partial(Settings, opener="support.fake_engine:open_fake", limits=lambda _device: {})
    monkeypatch.setattr(bench_run, "Settings", settings)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(build_app(requested={"bench"}), ["bench", *(str(a) for a in arguments)])

    return run


LOAD = ("--concurrency", 2, "--isl", 16, "--osl", 4, "--num-requests", 6, "--warmup", 2)


def bundle(tmp_path: Path, name: str = "fake", **script: object) -> Path:
    return fake_bundle(tmp_path / "builds", name, script=FakeScript(prefill_ns_per_token=0, step_ns=50_000, **script))


def test_one_table_has_every_engine_as_a_column(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path, "one"), bundle(tmp_path, "two")
    result = bench("builds/*.engine", *LOAD, "--label", "one=first", "--label", "two=second")
    assert result.exit_code == 0, result.output
    assert "Throughput: TPS (tok/s)" in result.stdout
    assert "first" in result.stdout
    assert "second" in result.stdout
    assert "records: results/token-tax" in result.stdout


def test_json_is_one_object_with_metrics_and_the_flat_vllm_keys(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path)
    result = bench("builds/fake.engine", *LOAD, "--json", "-o", "out", "--slo", "ttft:1000,tpot:1000")
    data = json.loads(result.stdout)
    (cell,) = data["results"]
    assert result.stderr == ""
    assert cell["protocol"] == "token-tax (modified)"
    assert cell["metrics"]["tps"]["unit"] == "tok/s"
    assert cell["vllm"]["completed"] == 6
    assert cell["vllm"]["request_goodput"] == pytest.approx(cell["vllm"]["request_throughput"])
    assert cell["workload"]["slo"] == {"ttft_ms": 1000, "tpot_ms": 1000, "e2e_ms": None}
    assert Path(cell["record"]).is_file()
    assert cell["repeats"] == []


def test_a_second_run_keeps_finished_cells_and_says_so(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path)
    bench("builds/fake.engine", *LOAD)
    again = bench("builds/fake.engine", *LOAD)
    assert again.exit_code == 0
    assert "1 of 1 cells are finished already" in again.stderr


def test_dry_run_lists_the_cells_and_starts_and_writes_nothing(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path, hang_at_open=True, max_seq_len=100)
    result = bench("builds/fake.engine", "--dry-run", "--concurrency", "1,2", "--isl", "16,98", "--osl", 4)
    assert result.exit_code == 0
    assert result.stdout.count("to run") == 2
    assert result.stdout.count("refused") == 2
    assert not (tmp_path / "results").exists()


def test_a_dying_engine_ends_with_exit_code_8_after_the_others_are_measured(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path, "a", die_at_token=5), bundle(tmp_path, "b")
    result = bench("builds/*.engine", *LOAD)
    assert result.exit_code == 8
    assert result.stderr.splitlines()[-1].startswith("trtkit: 1 cells have no result because their engine failed")
    assert "exit code 3" in result.stderr
    assert "Throughput: TPS (tok/s)" in result.stdout


def test_a_load_that_does_not_fit_is_said_and_ends_with_exit_code_5(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path, max_seq_len=100)
    result = bench("builds/fake.engine", *LOAD, "--isl", "16,98")
    assert result.exit_code == 5
    assert "ISL 98 + OSL 4 = 102 tokens exceed its max_seq_len 100" in result.stderr
    assert "ISL 16" in result.stdout


def test_an_invalid_cell_ends_with_exit_code_9(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path, short_by=1)
    result = bench("builds/fake.engine", *LOAD)
    assert result.exit_code == 9
    assert "token_counts" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/*.engine"], 8, "no/*.engine: no engine matches; build one with `trtkit build`"),
        (["no.engine"], 8, "no.engine: no such engine directory"),
        (["builds/fake.engine", "builds/fake.engine"], 2, "is given twice"),
        (["builds/fake.engine", "--protocol", "nope"], 2, "unknown protocol 'nope': known are demo, token-tax"),
        (["builds/fake.engine", "--concurrency", "0"], 2, "--concurrency '0': '0' is not a whole number"),
        (["builds/fake.engine", "--isl", "x"], 2, "--isl 'x': 'x' is not a whole number"),
        (["builds/fake.engine", "--request-rate", "-1"], 2, "--request-rate '-1': '-1' is not a number above 0"),
        (["builds/fake.engine", "--slo", "itl:3"], 2, "unknown metric 'itl'"),
        (["builds/fake.engine", "--kv", "h2o"], 2, "needs one budget"),
        (["builds/fake.engine", "--label", "other=x"], 2, "--label other: no such engine here; the engines are fake"),
        (["builds/fake.engine", "--dataset", "no.jsonl"], 3, "no.jsonl: no such file; --dataset is"),
        (["builds/fake.engine", "-o", "a-file"], 7, "cannot be written"),
        (["builds/fake.engine", "--isl", "1", "--num-requests", "200"], 2, "too few distinct prompts"),
    ],
    ids=lambda value: " ".join(value[1:])[:30] or value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_its_exit_code(
    bench: Bench, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    bundle(tmp_path, refuse_at_open=True)
    (tmp_path / "a-file").write_text("")
    load = ["--osl", 4] if "--isl" in arguments else LOAD
    result = bench(arguments[0], *load, *arguments[1:])
    assert result.exit_code == code, result.output
    assert result.stderr.splitlines()[-1].startswith("trtkit: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_label_for_several_engines_must_say_which(bench: Bench, tmp_path: Path) -> None:
    bundle(tmp_path, "one"), bundle(tmp_path, "two")
    result = bench("builds/*.engine", "--label", "x")
    assert result.exit_code == 2
    assert "with 2 engines say which, as ENGINE=TEXT" in result.stderr
