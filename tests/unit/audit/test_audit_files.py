import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support import synthetic_records

from trtkit.audit.records import check_result
from trtkit.audit.run import audit_file
from trtkit.spec.codec import write_record
from trtkit.spec.errors import InputError
from trtkit.spec.measured import Measured, Source
from trtkit.spec.result import BENCH_KIND, QUALITY_KIND
from trtkit.spec.speculation import SpeculationSpec

ROOT = Path(__file__).parents[3]
HEADER = "name,model,gpu,num_gpus,tp,precision,kv,kv_dtype,metric,concurrency,isl,osl,value,unit,price_usd_per_gpu_h"


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_the_token_tax_is_found_out():
    found = {f.name: f for f in audit_file(ROOT / "docs" / "examples" / "token-tax.md")}
    impossible = {name for name, f in found.items() if f.verdict == "impossible"}
    for config in ("Baseline", "INT8", "KV-pruned", "Optimized"):
        assert {f"{config} TTFT 512", f"{config} TTFT 4096"} <= impossible
    assert {"Baseline VRAM", "KV-pruned VRAM", "Optimized VRAM", "Optimized TPS b=32"} <= impossible
    assert {"INT8 TTFT 4096 if W8A8", "Optimized TTFT 4096 if W8A8"} <= impossible
    inconsistent = {name for name, f in found.items() if f.verdict == "inconsistent"}
    assert {"Baseline cost", "INT8 cost", "KV-pruned cost", "Optimized cost", "5,110 USD a month"} <= inconsistent
    assert {"KV per request at 4K", "KV of 32 x 4K", "INT8 VRAM", "KV-pruned TPS b=1"} <= inconsistent
    assert Counter(f.verdict for f in found.values())["unreadable"] == 0


def test_a_csv_of_claims_is_read_in_order(tmp_path):
    rows = [
        "a,Llama-3-70B,H100,1,1,INT8-WO,full,,ttft_ms,1,512,256,62,ms,",
        "b,Llama-3-70B,H100,1,1,INT8-WO,full,,ttft_ms,1,512,256,200,ms,",
    ]
    found = audit_file(write(tmp_path, "claims.csv", "\n".join([HEADER, *rows])))
    assert [(f.name, f.verdict) for f in found] == [("a", "impossible"), ("b", "possible")]


def test_the_ground_truths_columns_are_accepted(tmp_path):
    header = "source,engine,model,gpu,num_gpus,tp,precision,kv_dtype,isl,osl,batch_or_concurrency,metric,value,notes"
    row = "x,TensorRT-LLM,Llama-3.1-70B,H100,2,2,FP8,fp8,1000,1000,max (inf rate),throughput_tok_s_total,4391,n"
    found = audit_file(write(tmp_path, "t.csv", f"{header}\n{row}\n"))[0]
    assert (found.verdict, found.name) == ("possible", "row 1")


def test_a_wide_table_has_one_claim_per_metric_cell(tmp_path):
    text = "# Title\n\n| name | model | gpu | precision | ttft_ms | tpot_ms | isl |\n|---|---|---|---|---|---|---|\n"
    text += "| a | Llama-3-8B | H100 | FP16 | 1 | - | 4096 |\n"
    found = audit_file(write(tmp_path, "t.md", text))
    assert [(f.metric, f.verdict) for f in found] == [("ttft_ms", "impossible")]


def test_prose_and_other_tables_are_passed_over(tmp_path):
    text = "| fruit | colour |\n|---|---|\n| apple | red |\n"
    with pytest.raises(InputError, match="no Markdown table of claims"):
        audit_file(write(tmp_path, "t.md", text))


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.csv", "x,y\n1,2\n", "no table of claims"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"a": 1}', "not a result of"),
        ("a.json", "[1]", "must hold objects"),
        ("a.csv", '"unclosed', "not a CSV table"),
    ],
)
def test_a_file_without_claims_is_one_sentence(tmp_path, name, text, word):
    with pytest.raises(InputError, match=word):
        audit_file(write(tmp_path, name, text))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        audit_file(tmp_path / "none.csv")


DEFAULTS = {"model": "llama-3-70b", "gpu": "H100", "num_gpus": "1", "precision": "fp8"}
VLLM = {
    "model_id": "meta-llama/Meta-Llama-3-70B-Instruct",
    "completed": 100,
    "total_input_tokens": 51200,
    "total_output_tokens": 25600,
    "max_concurrency": 8,
    "output_throughput": 220.0,
    "mean_ttft_ms": 150.0,
    "mean_tpot_ms": 35.0,
    "request_throughput": 0.86,
}
AIPERF = {
    "time_to_first_token": {"avg": 150.0, "unit": "ms"},
    "inter_token_latency": {"avg": 35.0, "unit": "ms"},
    "request_latency": {"avg": 9.1, "unit": "s"},
    "output_token_throughput": {"avg": 220.0, "unit": "tokens/sec"},
    "input_sequence_length": {"avg": 512.0},
    "output_sequence_length": {"avg": 256.0},
    "input_config": {"loadgen": {"concurrency": 8}},
}
GUIDELLM = {
    "metadata": {"version": 2},
    "benchmarks": [
        {
            "metrics": {
                "time_to_first_token_ms": {"successful": {"mean": 150.0}},
                "inter_token_latency_ms": {"successful": {"mean": 35.0}},
                "request_latency": {"successful": {"mean": 9.1}},
                "output_tokens_per_second": {"successful": {"mean": 220.0}},
                "request_concurrency": {"successful": {"mean": 8.0}},
                "prompt_token_count": {"successful": {"mean": 512.0}},
                "output_token_count": {"successful": {"mean": 256.0}},
            }
        }
    ],
}
TRTLLM = {
    "engine": {"model": "meta-llama/Meta-Llama-3-70B-Instruct", "dtype": "bfloat16", "quantization": "FP8"},
    "world_info": {"tp_size": 1, "world_size": 1},
    "request_info": {"avg_num_concurrent_requests": 8.0, "avg_input_length": 512.0, "avg_output_length": 256.0},
    "performance": {"system_output_throughput_tok_s": 220.0, "avg_request_latency_ms": 9075.0},
    "streaming_metrics": {"avg_ttft_ms": 150.0, "avg_tpot_ms": 35.0},
}


@pytest.mark.parametrize("body", [VLLM, AIPERF, GUIDELLM, TRTLLM], ids=["vllm", "aiperf", "guidellm", "trtllm-bench"])
def test_other_tools_results_are_understood(tmp_path, body):
    found = audit_file(write(tmp_path, "r.json", json.dumps(body)), defaults=DEFAULTS)
    kinds = {f.metric: f for f in found}
    assert {"ttft_ms", "tpot_ms", "throughput_tok_s_total"} <= set(kinds)
    assert {f.verdict for f in found} == {"possible"}
    assert kinds["ttft_ms"].claimed == 150


def test_a_tools_impossible_number_is_found(tmp_path):
    body = {**VLLM, "mean_ttft_ms": 20.0, "output_throughput": 900.0}
    found = {f.metric: f for f in audit_file(write(tmp_path, "r.json", json.dumps(body)), defaults=DEFAULTS)}
    assert found["ttft_ms"].verdict == "impossible"
    assert found["throughput_tok_s_total"].verdict == "impossible"


def test_a_tools_rate_that_its_latencies_contradict_is_found(tmp_path):
    body = {**VLLM, "output_throughput": 260.0}
    found = {f.metric: f for f in audit_file(write(tmp_path, "r.json", json.dumps(body)), defaults=DEFAULTS)}
    assert found["throughput_tok_s_total"].verdict == "inconsistent"


def test_a_result_that_names_no_machine_says_which_column_is_empty(tmp_path):
    found = audit_file(write(tmp_path, "r.json", json.dumps(VLLM)))
    assert {f.verdict for f in found} == {"unreadable"}
    assert "column gpu: empty" in found[0].arithmetic


def share(value):
    return {"tpot_ms": Measured(value=value, unit="of limit", source=Source.MODELED, note="by count")}


@pytest.mark.parametrize(("value", "status"), [(0.6, "pass"), (1.02, "warn"), (1.3, "fail")])
def test_a_record_above_its_machines_limit_fails(value, status):
    result = replace(synthetic_records.bench(), shares=share(value))
    checks = {check.name: check for check in check_result(result)}
    assert checks["machine_limit.tpot_ms"].status == status


def test_a_record_whose_peak_cannot_hold_its_weights_fails():
    result = synthetic_records.bench()
    small = replace(result, memory=replace(result.memory, peak_bytes=result.memory.weight_bytes // 2))
    assert {c.name: c.status for c in check_result(small)}["memory_holds_weights"] == "fail"
    assert {c.name: c.status for c in check_result(result)}["memory_holds_weights"] == "pass"


def test_a_record_without_limits_or_memory_is_skipped_not_passed():
    result = synthetic_records.bench()
    bare = replace(result, shares={}, memory=replace(result.memory, weight_bytes=None))
    assert {c.status for c in check_result(bare)} == {"skipped"}
    assert check_result(replace(bare, metrics={})) == ()


def test_a_gpu_record_is_held_against_the_datasheet():
    result = synthetic_records.bench()
    plan = replace(result.engine.plan, gpu="h100-sxm", target="tensorrt")
    on_gpu = replace(
        result,
        engine=replace(result.engine, plan=plan),
        environment=synthetic_records.environment(device="cuda:0"),
    )
    fast = replace(on_gpu.metrics["tpot_ms"], stats={"p50": synthetic_records.stat(1e-6)})
    slow = {c.name: c.status for c in check_result(on_gpu)}
    broken = {c.name: c.status for c in check_result(replace(on_gpu, metrics={**on_gpu.metrics, "tpot_ms": fast}))}
    assert slow["datasheet_limit.tpot_ms"] == "pass"
    assert broken["datasheet_limit.tpot_ms"] == "fail"


def test_a_gpu_record_with_speculation_is_held_against_all_its_guesses_and_against_those_that_were_right():
    result = synthetic_records.bench()
    plan = replace(result.engine.plan, gpu="h100-sxm")
    guessing = replace(plan, speculation=SpeculationSpec(max_draft_tokens=3))

    def limits(plan, accepted):
        repeats = tuple(replace(r, kv=replace(r.kv, accepted_tokens=accepted)) for r in result.repeats)
        on_gpu = replace(
            result,
            engine=replace(result.engine, plan=plan),
            repeats=repeats,
            environment=synthetic_records.environment(device="cuda:0"),
        )
        details = {c.name: c.detail for c in check_result(on_gpu)}
        return [
            float(details[f"datasheet_limit.{key}"].split()[place].replace(",", ""))
            for key, place in (("tpot_ms", 7), ("tps", 6))
        ]

    tokens = sum(sample.output_tokens for sample in result.repeats[0].samples)
    tpot_ms, tps = limits(plan, 0)
    assert limits(guessing, 0) == [pytest.approx(tpot_ms / 4, abs=1e-3), tps]
    assert limits(guessing, tokens // 2)[1] == pytest.approx(2 * tps, rel=1e-3)
    assert limits(guessing, None)[1] == pytest.approx(4 * tps, rel=1e-3)
    assert limits(guessing, tokens - 1)[1] == pytest.approx(4 * tps, rel=1e-3), "no step gives more than its guesses"
    assert limits(plan, tokens // 2)[1] == tps, "and without guesses none gives more than one"


def test_a_gpu_record_with_block_reuse_is_held_against_what_it_had_to_compute():
    result = synthetic_records.bench(isl=4096)
    plan = replace(result.engine.plan, gpu="h100-sxm")

    def check(load, limits, ttft_ms=1e-9):
        quick = replace(result.metrics["ttft_ms"], stats={"p50": synthetic_records.stat(ttft_ms)})
        record = replace(
            result,
            engine=replace(result.engine, plan=replace(plan, limits=limits)),
            workload=load,
            environment=synthetic_records.environment(device="cuda:0"),
            metrics={"ttft_ms": quick},
        )
        return next(c for c in check_result(record) if c.name == "datasheet_limit.ttft_ms")

    alike = replace(result.workload, shared_prefix_tokens=4095)
    reusing = replace(plan.limits, enable_block_reuse=True)
    whole = check(alike, plan.limits)
    assert check(result.workload, reusing).detail == whole.detail, (
        "prompts without a shared prefix have nothing to reuse"
    )
    assert check(alike, reusing).detail != whole.detail
    between_ms = 0.01
    assert check(alike, plan.limits, between_ms).status == "fail"
    assert check(alike, reusing, between_ms).status == "pass"


def test_a_records_checks_are_its_findings(tmp_path):
    result = replace(synthetic_records.bench(), shares=share(1.3))
    path = tmp_path / "r.json"
    write_record(path, BENCH_KIND, result)
    found = {f.metric: f for f in audit_file(path)}
    assert found["tpot_ms"].verdict == "impossible"
    assert found["tpot_ms"].share_of_limit == 1.3


def test_a_quality_record_is_read(tmp_path):
    result = synthetic_records.quality()
    path = tmp_path / "q.json"
    write_record(path, QUALITY_KIND, result)
    assert audit_file(path)[0].verdict == "possible"
    write_record(path, QUALITY_KIND, replace(result, unit="%", better="higher", score=140.0))
    assert audit_file(path)[0].verdict == "impossible"


def test_a_shipped_example_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert audit_file(Path("examples/token-tax.md"))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "token-tax.md").write_text("no table here", encoding="utf-8")
    with pytest.raises(InputError, match=r"token-tax\.md"):
        audit_file(Path("examples/token-tax.md"))
