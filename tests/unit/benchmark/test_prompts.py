from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.fake_engine import tiny_model

from trtkit.benchmark.prompts import build_prompts, plain_ids, read_jsonl, synthetic_phases
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.workload import Workload

MODEL = tiny_model()
LOAD = Workload(isl=20, osl=4, num_requests=6, concurrency=2)


def build(workload: Workload = LOAD, *, repeats: int = 2, warmup: int = 3, tokenizer: Path | None = None):
    return build_prompts(workload, MODEL, tokenizer, repeats=repeats, warmup=warmup)


def every(prompts) -> list[tuple[int, ...]]:
    return [tuple(p.tolist()) for phase in (prompts.warmup, *prompts.repeats) for p in phase]


def test_synthetic_prompts_have_the_exact_length_and_number() -> None:
    prompts = build()
    assert [len(prompts.warmup), *map(len, prompts.repeats)] == [3, 6, 6]
    assert {len(p) for p in every(prompts)} == {20}


def test_no_synthetic_prompt_appears_twice_in_warm_up_and_all_repeats() -> None:
    prompts = every(build(replace(LOAD, isl=2, num_requests=5000)))
    assert len(set(prompts)) == len(prompts) == 3 + 2 * 5000


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    assert every(build()) == every(build())
    assert not set(every(build())) & set(every(build(replace(LOAD, seed=1))))


def test_cells_of_one_protocol_share_no_prompt() -> None:
    assert not set(every(build())) & set(every(build(replace(LOAD, concurrency=8))))


def test_what_does_not_shape_the_load_does_not_change_the_prompts() -> None:
    assert every(build(replace(LOAD, warmup_requests=9))) == every(build())


def test_special_ids_are_in_no_prompt(tmp_path: Path) -> None:
    added = [{"id": 7, "special": True}, {"id": 8, "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    ids = set(plain_ids(MODEL, tmp_path).tolist())
    assert set(range(300)) - ids == {1, 2, 7}


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
        plain_ids(MODEL, tmp_path)


def test_too_few_distinct_prompts_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="too few distinct prompts"):
        synthetic_phases(np.arange(10, dtype=np.int32), 1, [11], 0)


def test_synthetic_prompts_without_a_length_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 token"):
        build(replace(LOAD, isl=0))


def jsonl(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_files_prompts_keep_their_order_and_lengths_in_every_repeat(tmp_path: Path) -> None:
    name = jsonl(tmp_path, {"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8, 9]}, "", {"prompt_ids": [10]})
    prompts = build(replace(LOAD, dataset=name, isl=0, num_requests=2))
    assert [[p.tolist() for p in repeat] for repeat in prompts.repeats] == [[[5, 6, 7], [8, 9]]] * 2
    assert [len(p) for p in prompts.warmup] == [3, 2, 3]
    assert not {tuple(p.tolist()) for p in prompts.warmup} & {(5, 6, 7), (8, 9)}


def test_with_a_length_a_files_prompts_are_cut_to_it_and_short_ones_left_out(tmp_path: Path) -> None:
    name = jsonl(tmp_path, {"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8]}, {"prompt_ids": [9, 10]})
    prompts = build(replace(LOAD, dataset=name, isl=2, num_requests=2))
    assert [p.tolist() for p in prompts.repeats[0]] == [[5, 6], [9, 10]]


def test_a_file_with_too_few_prompts_says_how_many_it_has(tmp_path: Path) -> None:
    name = jsonl(tmp_path, {"prompt_ids": [5]})
    with pytest.raises(InputError, match=r"has 1 prompts, 6 are asked for; use --num-requests 1"):
        build(replace(LOAD, dataset=name, isl=0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":1: not JSON"),
        ("[1]", ":1: expected an object"),
        ({"text": "x"}, ":1: needs 'prompt_ids'"),
        ({"prompt_ids": []}, "at least one integer"),
        ({"prompt_ids": [1.5]}, "at least one integer"),
        ({"prompt_ids": [True]}, "at least one integer"),
        ({"prompt_ids": [300]}, "outside the vocabulary of 300"),
        ({"prompt_ids": [-1]}, "outside the vocabulary"),
        ({"prompt": "text"}, "without a tokenizer"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_jsonl(Path(jsonl(tmp_path, row)), MODEL, None))


def test_a_missing_file_says_what_a_dataset_may_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; --dataset is synthetic, sharegpt"):
        build(replace(LOAD, dataset=str(tmp_path / "no.jsonl")))


def test_prompts_with_a_shared_prefix_differ_in_the_rest_alone() -> None:
    shared = every(build(replace(LOAD, shared_prefix_tokens=16)))
    assert len({prompt[:16] for prompt in shared}) == 1
    assert len({prompt[16:] for prompt in shared}) == len(shared)
    assert {len(prompt) for prompt in shared} == {20}


def test_cells_with_other_shared_prefixes_share_none() -> None:
    one, other = (every(build(replace(LOAD, shared_prefix_tokens=count))) for count in (16, 12))
    assert one[0][:8] != other[0][:8] != every(build())[0][:8]


def test_a_prefix_that_leaves_too_few_prompts_is_refused() -> None:
    with pytest.raises(UsageError, match="1 of them free"):
        build(replace(LOAD, shared_prefix_tokens=19, num_requests=5000))
