from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.fake_engine import tiny_model

from trtkit.benchmark import prompts as prompts_module
from trtkit.benchmark.prompts import build_prompts
from trtkit.benchmark.sharegpt import HUB_FILE, locate, prompts_of, read_conversations
from trtkit.spec.errors import InputError
from trtkit.spec.workload import Workload


class Words:
    """One id per word, the word's own number; BOS is 1."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [int(word) for word in text.split()]


def conversations(count: int, turns: int = 4, words: int = 25) -> list[tuple[str, ...]]:
    return [tuple(" ".join([str(10 + index)] * words) for _ in range(turns)) for index in range(count)]


def prompts(found: list[tuple[str, ...]], isl: int, seed: int = 0) -> list[np.ndarray]:
    return list(prompts_of(found, Words(), isl, np.random.default_rng(seed)))


@pytest.mark.parametrize("isl", [60, 512, 4096])
def test_prompts_of_any_length_come_out_exact(isl: int) -> None:
    made = prompts(conversations(200), isl)
    assert {p.size for p in made} == {isl}
    # Each conversation gives 100 ids at most, and what is left of the last one is not used again.
    assert len(made) == (200 if isl == 60 else 200 // -(-(isl - 1) // 100))


def test_each_conversation_is_used_once() -> None:
    seen: set[int] = set()
    for prompt in prompts(conversations(100), 250):
        own = set(prompt.tolist()) - {1}
        assert not own & seen
        seen |= own


def test_each_prompt_starts_with_one_bos() -> None:
    for prompt in prompts(conversations(30), 250):
        assert prompt[0] == 1
        assert (prompt[1:] != 1).all()


def test_order_comes_from_the_seed() -> None:
    first, again, other = (prompts(conversations(30), 60, seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sharegpt.json"
    path.write_text(text)
    return path


def rows(found: list[tuple[str, ...]]) -> list[dict]:
    return [{"id": "x", "conversations": [{"from": "human", "value": turn} for turn in turns]} for turns in found]


def test_a_list_and_one_object_a_line_read_the_same(tmp_path: Path) -> None:
    data = rows([("a", "b"), ("c", " ")])
    as_list = read_conversations(write(tmp_path, json.dumps(data)))
    as_lines = read_conversations(write(tmp_path, "\n".join(json.dumps(row) for row in data)))
    assert as_list == as_lines == [("a", "b"), ("c",)]


@pytest.mark.parametrize("text", ["{", '[{"id": 1}]', '[{"conversations": [3]}]', "[1]"])
def test_another_format_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="not ShareGPT's format"):
        read_conversations(write(tmp_path, text))


def test_offline_without_a_copy_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args: object, **_kwargs: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=rf"download {HUB_FILE} .*--dataset sharegpt:FILE"):
        locate("")
    with pytest.raises(InputError, match="no such file"):
        locate(str(tmp_path / "no.json"))


def test_a_cell_takes_warm_up_and_repeats_from_different_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "load_encoder", lambda _directory: Words())
    path = write(tmp_path, json.dumps(rows(conversations(40))))
    load = Workload(isl=150, osl=4, num_requests=5, dataset=f"sharegpt:{path}")
    made = build_prompts(load, tiny_model(), None, repeats=2, warmup=3)
    assert [len(made.warmup), *map(len, made.repeats)] == [3, 5, 5]
    used = [set(p.tolist()) - {1} for phase in (made.warmup, *made.repeats) for p in phase]
    assert sum(map(len, used)) == len(set.union(*used))
    with pytest.raises(InputError, match=r"give 20 prompts of 150 tokens when each is used once, 103 are asked for"):
        build_prompts(load, tiny_model(), None, repeats=20, warmup=3)
