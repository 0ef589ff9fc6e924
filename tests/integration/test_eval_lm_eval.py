"""Task by task, our scoring equals lm-eval's own Hugging Face backend on the same weights, where nothing is evicted."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from support.engine_models import kv_bytes, limits, make_hf, open_hf, spec_of, trtllm_tensors
from support.synthetic_records import engine, environment

from trtkit.backends.tokenizer import HFTokenizer, load_tokenizer
from trtkit.engine.open import open_tensors
from trtkit.quality.lm_eval_model import EngineLM
from trtkit.quality.local_tasks import prepare_tasks
from trtkit.quality.records import QualitySource
from trtkit.quality.scoring import ContinuationScorer
from trtkit.quality.selftest import check_alignment
from trtkit.quality.tasks import TaskSelection, run_tasks
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "bench" / "tiny_model" / "model"
TASKS = ROOT / "bench" / "tasks"
TEXTS = [
    "import os\n\n\ndef main():\n    return os.path\n" * 9,
    "class A:\n    x = 1\n",
    "for i in range(10):\n    print(i)\n",
]


def own_tasks(directory: Path) -> None:
    """One task of every other kind: a greedy continuation, whole texts, generated answers."""
    rows = [{"text": t, "context": t[: len(t) // 2], "rest": t[len(t) // 2 :][:20]} for t in TEXTS]
    data = directory / "texts.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    kinds = {
        "own_continuation": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{rest}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        },
        "own_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "own_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{rest}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, body in kinds.items():
        (directory / f"{name}.yaml").write_text(
            json.dumps({"task": name, **shared, **body, "metadata": {"version": 1}})
        )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("own")
    own_tasks(source)
    for group in ("mini_mmlu", "mini_recall"):
        (source / group).symlink_to(TASKS / group)
    return prepare_tasks(source, tmp_path_factory.mktemp("tasks") / "all")


def evaluate(lm, tasks: Path, names: list[str], limit: int = 4, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=lm, tasks=names, limit=limit, bootstrap_iters=10, task_manager=manager, **options)


def our_lm(ours, tokenizer) -> EngineLM:
    scoring = ContinuationScorer(scorer=ours, info=ours.info)
    return EngineLM(ours, scoring, tokenizer, self_test=functools.partial(check_alignment, ours, ours))


@pytest.mark.parametrize(("kind", "seed"), [("Llama", 0), ("Qwen2", 1)])
def test_every_task_equals_lm_evals_hugging_face_backend(kind: str, seed: int, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    inner = AutoTokenizer.from_pretrained(str(TOKENIZER))
    hf = make_hf(kind, seed=seed, vocab_size=len(inner), max_position_embeddings=2048, eos_token_id=inner.eos_token_id)
    ours = open_hf(hf, blocks=1024, max_seq_len=1024, max_num_tokens=1024)
    names = ["mini_mmlu", "mini_recall", "own_continuation", "own_rolling", "own_generate"]
    peer = evaluate(HFLM(pretrained=hf, tokenizer=inner, batch_size=1, device="cpu", max_length=1024), tasks, names)
    mine = evaluate(our_lm(ours, HFTokenizer(inner)), tasks, names)
    assert set(mine["samples"]) == set(peer["samples"])
    for task, samples in peer["samples"].items():
        for theirs, own in zip(samples, mine["samples"][task], strict=True):
            assert own["prompt_hash"] == theirs["prompt_hash"]
            if task == "own_generate":
                assert own["resps"] == theirs["resps"]
            elif task == "own_rolling":
                assert [r[0] for r in own["resps"]] == pytest.approx([r[0] for r in theirs["resps"]], abs=2e-3)
            else:
                assert [r[0][0] for r in own["resps"]] == pytest.approx([r[0][0] for r in theirs["resps"]], abs=1e-3)
                assert [r[0][1] for r in own["resps"]] == [r[0][1] for r in theirs["resps"]]
    for name in names:
        for metric, value in peer["results"][name].items():
            if isinstance(value, float):
                assert mine["results"][name][metric] == pytest.approx(value, rel=1e-3), f"{name} {metric}"


def test_the_shipped_task_runs_through_the_eviction_path(tasks: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    hf = make_hf(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    selection = TaskSelection(names=("mini_mmlu",), directory=tasks, num_fewshot=2, limit=3)
    source = QualitySource(engine=engine("fp32"), environment=environment())
    records = {}
    for policy in ("full", "window:budget=64,interval=16"):
        ours = open_tensors(
            spec_of(hf),
            trtllm_tensors(hf),
            limits=limits(max_seq_len=1024, kv_memory_bytes=kv_bytes(spec_of(hf), 1024)),
            kv_policy=parse_kv_policy(policy),
        )
        records[policy] = run_tasks(ours, tokenizer, source, selection)[0]
    assert records["window:budget=64,interval=16"].valid
    assert records["window:budget=64,interval=16"].evictions >= 18
    assert records["full"].evictions == 0
    documents = [[d.document for d in record.documents] for record in records.values()]
    assert documents[0] == documents[1]
    assert [d.values for d in records["full"].documents] != [
        d.values for d in records["window:budget=64,interval=16"].documents
    ]


def test_an_unknown_task_names_its_near_misses(tasks: Path) -> None:
    selection = TaskSelection(names=("mini_mmul",), directory=tasks)
    hf = make_hf()
    source = QualitySource(engine=engine("fp32"), environment=environment())
    with pytest.raises(UsageError, match="unknown task 'mini_mmul': did you mean mini_mmlu"):
        run_tasks(open_hf(hf), load_tokenizer(TOKENIZER), source, selection)


def test_groups_of_groups_become_one_record_with_their_subjects(tasks: Path, tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    nested.mkdir()
    for file in tasks.glob("mini_*.yaml"):
        (nested / file.name).symlink_to(file)
    outer = {"group": "all_mini", "task": ["mini_mmlu", "mini_recall"], "metadata": {"version": 1}}
    outer["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (nested / "outer.yaml").write_text(json.dumps(outer))
    tokenizer = load_tokenizer(TOKENIZER)
    hf = make_hf(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    source = QualitySource(engine=engine("fp32"), environment=environment())
    selection = TaskSelection(names=("all_mini", "mini_recall"), directory=nested, limit=2)
    records = run_tasks(open_hf(hf, blocks=1024, max_seq_len=1024), tokenizer, source, selection)
    by_key = {(r.task, r.metric): r for r in records}
    assert set(by_key) == {(t, m) for t in ("all_mini", "mini_recall") for m in ("acc", "gold_logprob")}
    outer_record = by_key["all_mini", "acc"]
    assert len({d.group for d in outer_record.documents}) == 8
    assert outer_record.score == pytest.approx(sum(d.score for d in outer_record.documents) / 16)
    assert [c.detail for c in by_key["mini_recall", "acc"].checks if c.name == "resumed"] == [
        "4 of 4 contexts were finished before"
    ]
