"""The peers of a GPU run, without them: what they are asked, by a strict fake, and how their wheels travel."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import types
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import pytest

from bench.gpu import recompute
from bench.gpu import rows as table
from bench.gpu.peers import rounds, split_wheel, transformers_static, vllm_dummy
from bench.gpu.peers import run as peers
from trtkit.spec.codec import read_record, to_plain
from trtkit.spec.workload import Workload

ROOT = Path(__file__).parents[2]


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    """The arguments we use, and no others."""

    temperature: float
    max_tokens: int
    ignore_eos: bool
    detokenize: bool
    output_kind: RequestOutputKind


@dataclass(kw_only=True)
class AsyncEngineArgs:
    """The arguments we use, and no others."""

    model: str
    load_format: str
    skip_tokenizer_init: bool
    dtype: str
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    enable_prefix_caching: bool
    disable_log_stats: bool
    seed: int


class FakeVllm:
    """Answers with `per_message` tokens at a time, `short_by` too few."""

    opened: list[AsyncEngineArgs]

    def __init__(self, per_message: int = 1, short_by: int = 0) -> None:
        self.opened, self.prompts, self.shut = [], [], 0
        fake = self

        class AsyncLLM:
            @classmethod
            def from_engine_args(cls, args: AsyncEngineArgs) -> AsyncLLM:
                fake.opened.append(args)
                return cls()

            async def generate(self, prompt: dict, params: SamplingParams, request_id: str) -> AsyncIterator:
                assert list(prompt) == ["prompt_token_ids"]
                assert all(type(token) is int for token in prompt["prompt_token_ids"])
                assert params.output_kind is RequestOutputKind.DELTA
                fake.prompts.append((request_id, tuple(prompt["prompt_token_ids"])))
                left = params.max_tokens - short_by
                while left > 0:
                    count = min(per_message, left)
                    left -= count
                    yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[5] * count)])

            def shutdown(self) -> None:
                fake.shut += 1

        self.async_llm = AsyncLLM

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
        modules: dict[str, dict[str, object]] = {
            "vllm": {"SamplingParams": SamplingParams},
            "vllm.engine": {},
            "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
            "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
            "vllm.v1": {},
            "vllm.v1.engine": {},
            "vllm.v1.engine.async_llm": {"AsyncLLM": self.async_llm},
        }
        for name, content in modules.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        return self


def setup(tmp_path: Path, left_s: Callable[[], float] = lambda: 60.0) -> vllm_dummy.Setup:
    model = table.real_scale("h100-sxm").model
    return vllm_dummy.Setup(model=model, loads=((1, 8, 4), (3, 8, 4)), work_dir=tmp_path, left_s=left_s)


@pytest.mark.parametrize("quantisation", ["fp8", "int8-gptq"])
def test_vllm_is_asked_for_random_8_bit_weights_of_the_true_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantisation: str
) -> None:
    fake = FakeVllm().install(monkeypatch)
    cells = vllm_dummy.run(setup(tmp_path), quantisation)
    assert [(cell.concurrency, len(cell.rounds), cell.not_run) for cell in cells] == [(1, 3, None), (3, 3, None)]
    (args,) = fake.opened
    config = json.loads((Path(args.model) / "config.json").read_text())
    assert (args.load_format, args.skip_tokenizer_init, args.enable_prefix_caching) == ("dummy", True, False)
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (80, 8192, 128256)
    assert config["quantization_config"]["quant_method"] == {"fp8": "fp8", "int8-gptq": "gptq"}[quantisation]
    assert args.max_model_len == 12
    assert fake.shut == 1


def test_every_round_has_prompts_of_its_own_and_the_first_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm().install(monkeypatch)
    vllm_dummy.run(setup(tmp_path), "fp8")
    assert len(fake.prompts) == 4 * 1 + 4 * 3
    assert len({prompt for _, prompt in fake.prompts}) == len(fake.prompts)


def test_tokens_that_come_several_at_a_time_are_all_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeVllm(per_message=3).install(monkeypatch)
    cells = vllm_dummy.run(setup(tmp_path), "fp8")
    assert all(each.tps > 0 and each.tpot_ms >= 0 for cell in cells for each in cell.rounds)
    assert {request.tokens for cell in cells for each in cell.rounds for request in each.requests} == {(3, 4)}


def test_a_peer_that_makes_too_few_tokens_gives_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeVllm(short_by=1).install(monkeypatch)
    cells = vllm_dummy.run(setup(tmp_path), "fp8")
    assert [cell.rounds for cell in cells] == [(), ()]
    assert "3 tokens were made, 4 were asked for" in cells[0].not_run


def test_without_vllm_one_line_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    (cell, _) = vllm_dummy.run(setup(tmp_path), "fp8")
    assert "'vllm' is missing" in cell.not_run
    assert "\n" not in cell.not_run


def test_no_time_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeVllm().install(monkeypatch)
    cells = vllm_dummy.run(setup(tmp_path, left_s=lambda: -1.0), "fp8")
    assert {cell.not_run for cell in cells} == {"no time was left"}


def test_a_rounds_numbers_are_those_of_its_raw_times_and_a_changed_one_is_found() -> None:
    """By hand: first tokens after 10 and 12 ms, (40 - 10) / 3 and (39 - 13) / 2 ms a token, 8 tokens in 40 ms."""
    asked = rounds.Arrivals(asked_ms=0.0, times_ms=(10.0, 20.0, 30.0, 40.0), tokens=(1, 2, 3, 4))
    late = rounds.Arrivals(asked_ms=1.0, times_ms=(13.0, 39.0), tokens=(2, 4))
    each = rounds.round_of([asked, late], 4)
    assert (each.ttft_ms, each.tpot_ms, each.tps) == (11.0, 11.5, 200.0)
    with pytest.raises(RuntimeError, match="4 tokens were made, 5 were asked for"):
        rounds.round_of([asked], 5)
    cell = rounds.PeerCell(
        who="vllm", version="", model="m", precision="fp8", concurrency=2, isl=8, osl=4, rounds=(each,)
    )
    record = json.loads(json.dumps({"cells": [to_plain(cell)]}))
    assert (recompute.peer_differences(record), recompute.peer_differences(record).compared) == ([], 6)
    for key in ("ttft_ms", "tpot_ms", "tps"):
        record["cells"][0]["rounds"][0][key] *= 1.01
    record["cells"][0]["concurrency"] = 3
    assert len(recompute.peer_differences(record)) == 4


def test_a_peers_line_shows_the_median_and_the_spread() -> None:
    one = rounds.Round(ttft_ms=10.0, tpot_ms=2.0, tps=100.0)
    cell = rounds.PeerCell(
        who="vllm", version="0.26.0", model="m", precision="fp8", concurrency=1, isl=8, osl=4,
        rounds=(one, replace(one, ttft_ms=12.0), replace(one, ttft_ms=11.0)),
    )  # fmt: skip
    assert "TTFT ms 11 (10-12)" in rounds.line(cell)
    assert "not run: why" in rounds.line(replace(cell, not_run="why"))


def test_a_peer_whose_process_hangs_or_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RESERVE_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (cell,) = peers.in_child("transformers", 5.0, rehearse=True)
    assert cell.not_run == "its process ended with exit code 1"


def test_without_wheels_every_vllm_row_is_listed_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_has_vllm", lambda: False)
    out = tmp_path / "peers.json"
    record = peers.run_all(["vllm-fp8", "vllm-int8-gptq"], 60.0, out, rehearse=True)
    assert all("TRTKIT_PEERS" in cell.not_run for cell in record.cells)
    assert read_record(out, peers.KIND, rounds.PeerRecord) == record
    assert record.lines == ()


def wheel(directory: Path, name: str, size: int) -> Path:
    path = directory / name
    path.write_bytes(bytes((index * 31) % 251 for index in range(size)))
    return path


def test_wheels_travel_in_pieces_over_several_transfers_and_come_back_whole(tmp_path: Path) -> None:
    files = [wheel(tmp_path, "a-1-py3-none-any.whl", 1000), wheel(tmp_path, "b-1-py3-none-any.whl", 90)]
    listing = split_wheel.split(files, tmp_path / "out", 300)
    assert [len(entry["pieces"]) for entry in listing.values()] == [4, 1]
    first, second, store = tmp_path / "first", tmp_path / "second", tmp_path / "store"
    for target, names in ((first, ["part000", "part001"]), (second, ["part002", "part003"])):
        target.mkdir()
        for path in (tmp_path / "out").iterdir():
            if path.name == split_wheel.LIST_NAME or path.suffix[1:] in names:
                (target / path.name).write_bytes(path.read_bytes())
    assert len(split_wheel.collect(first, store)) == 2
    assert split_wheel.collect(second, store) == []
    assert [path.read_bytes() for path in split_wheel.join(store)] == [path.read_bytes() for path in files]


def test_a_damaged_piece_is_asked_for_again_and_nothing_is_joined(tmp_path: Path) -> None:
    split_wheel.split([wheel(tmp_path, "a.whl", 1000)], tmp_path / "out", 300)
    split_wheel.collect(tmp_path / "out", tmp_path / "store")
    damaged = tmp_path / "store" / "a.whl.part001"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(split_wheel.PieceError, match=r"a\.whl\.part001"):
        split_wheel.join(tmp_path / "store")
    assert not (tmp_path / "store" / "a.whl").exists()
    assert split_wheel.collect(tmp_path / "nothing", tmp_path / "store") == ["a.whl.part001"]
    assert split_wheel.collect(tmp_path / "out", tmp_path / "store") == []


def test_pieces_have_the_checksum_of_their_content(tmp_path: Path) -> None:
    listing = split_wheel.split([wheel(tmp_path, "a.whl", 500)], tmp_path / "out", 200)
    for piece in listing["a.whl"]["pieces"]:
        assert hashlib.sha256((tmp_path / "out" / piece["name"]).read_bytes()).hexdigest() == piece["sha256"]


def test_bad_input_to_the_splitter_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench/gpu/peers/split_wheel.py")]
    for arguments in (
        ["split", "nowhere.whl", "--to", str(tmp_path / "o")],
        ["collect", str(tmp_path), "--store", "s"],
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_transformers_runs_beside_our_engine_and_its_loop_makes_the_tokens_that_generate_makes(tmp_path: Path) -> None:
    import torch

    model = table.rehearsal_scale().model
    asked = transformers_static.rehearsal_setup(model, tmp_path, lambda: 60.0)
    theirs = transformers_static.Theirs(asked)
    load = Workload(isl=16, osl=6, num_requests=2, concurrency=2)
    made: list[torch.Tensor] = []
    step = theirs._next
    theirs._next = lambda *args: made.append(step(*args)) or made[-1]
    theirs.looped(load, 1)
    ids = theirs._ids(load, 1)
    with torch.inference_mode():
        whole = theirs._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
            cache_implementation="static",
        )  # fmt: skip
    assert torch.equal(torch.cat(made, 1), whole[:, load.isl :])

    cells = transformers_static.compare(asked)
    assert [(cell.who.split()[0], cell.concurrency) for cell in cells[:3]] == [
        ("transformers", 1), ("transformers", 1), ("trtkit", 1),
    ]  # fmt: skip
    assert [(cell.not_run, len(cell.rounds)) for cell in cells] == [(None, 2)] * 6
    kept = [(cell.who, len(request.times_ms)) for cell in cells for each in cell.rounds for request in each.requests]
    assert {times for who, times in kept if who == "trtkit"} == {6}
    assert {times for who, times in kept if who != "trtkit"} == {2}
