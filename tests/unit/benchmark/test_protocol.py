from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trtkit.benchmark.checks import MIN_ROUNDS
from trtkit.benchmark.protocol import (
    Changes,
    changed,
    load_protocol,
    parse_numbers,
    parse_protocol,
    parse_rates,
    parse_slo,
    protocol_files,
)
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.workload import SLO


def test_token_tax_is_the_published_protocol() -> None:
    protocol = load_protocol("token-tax")
    assert protocol.name == "token-tax"
    assert {(w.concurrency, w.isl) for w in protocol.workloads} == {(c, i) for c in (1, 8, 32) for i in (512, 4096)}
    assert {(w.osl, w.num_requests, w.warmup_requests, w.ignore_eos) for w in protocol.workloads} == {
        (256, 500, 50, True)
    }


@pytest.mark.parametrize("name", sorted(protocol_files()))
def test_every_shipped_protocol_has_enough_requests_for_its_concurrency(name: str) -> None:
    for workload in load_protocol(name).workloads:
        assert workload.num_requests >= MIN_ROUNDS * workload.concurrency


def test_demo_repeats_often_enough_for_intervals_and_fits_the_tiny_model() -> None:
    protocol = load_protocol("demo")
    assert protocol.repeats >= 3
    assert max(w.isl + w.osl for w in protocol.workloads) <= 512


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown protocol 'tokentax': known are .*demo.*token-tax"):
        load_protocol("tokentax")


def document(**changes: object) -> dict[str, object]:
    return {"name": "p", "repeats": 1, "workload": [{"isl": 8, "osl": 2, "num_requests": 3}], **changes}


def test_lists_make_a_grid_over_the_defaults() -> None:
    table = {"isl": [8, 16], "concurrency": [1, 2]}
    protocol = parse_protocol(document(defaults={"osl": 2, "num_requests": 9}, workload=[table]), "p.toml")
    assert [(w.isl, w.concurrency, w.osl, w.num_requests) for w in protocol.workloads] == [
        (8, 1, 2, 9),
        (8, 2, 2, 9),
        (16, 1, 2, 9),
        (16, 2, 2, 9),
    ]


def test_a_rate_without_a_concurrency_is_an_open_loop_without_a_cap() -> None:
    table = {"isl": 8, "osl": 2, "num_requests": 3, "request_rate": 2.5}
    (workload,) = parse_protocol(document(workload=[table]), "p.toml").workloads
    assert (workload.concurrency, workload.request_rate) == (None, 2.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmups": 3}, "unknown key 'warmups'; known are name"),
        ({"workload": []}, r"at least one \[\[workload\]\]"),
        ({"workload": [3]}, r"at least one \[\[workload\]\]"),
        ({"workload": [{"isl": 8, "osl": 2, "num_requests": 3, "cc": 1}]}, r"workload\[0\]: unknown key 'cc'"),
        ({"workload": [{"isl": 8, "osl": 2}]}, "key 'num_requests' is missing"),
        ({"workload": [{"isl": "8", "osl": 2, "num_requests": 3}]}, r"workload\[0\]\.isl: expected int"),
        ({"workload": [{"isl": 8, "osl": 0, "num_requests": 3}]}, "osl=0"),
        ({"repeats": 0}, "at least one workload and one repeat"),
        ({"repeats": "3"}, "repeats: expected int"),
    ],
)
def test_a_wrong_document_is_refused_with_the_files_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=rf"p\.toml: .*{message}"):
        parse_protocol(document(**changes), "p.toml")


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("name = ")
    with pytest.raises(InputError, match=r"p\.toml: not a TOML file"):
        load_protocol(str(path))
    with pytest.raises(InputError, match=r"no\.toml: no such protocol file"):
        load_protocol(str(tmp_path / "no.toml"))


def test_no_flags_leave_the_protocol_as_it_is() -> None:
    protocol = load_protocol("demo")
    assert changed(protocol, Changes()) is protocol


def test_flags_replace_their_axis_and_the_name_says_so() -> None:
    protocol = changed(load_protocol("token-tax"), Changes(concurrency=[2, 64], isl=[128], num_requests=10, repeats=3))
    assert protocol.name == "token-tax (modified)"
    assert protocol.repeats == 3
    assert [(w.concurrency, w.isl, w.num_requests) for w in protocol.workloads] == [(2, 128, 10), (64, 128, 10)]


def test_a_shared_prefix_is_held_against_the_length_that_will_run() -> None:
    demo = load_protocol("demo")
    (load,) = changed(demo, Changes(concurrency=[1], isl=[4096], shared_prefix_tokens=4000)).workloads
    assert (load.isl, load.shared_prefix_tokens) == (4096, 4000)
    alike = replace(demo, workloads=(load,))
    (plain,) = changed(alike, Changes(isl=[64], shared_prefix_tokens=0)).workloads
    assert (plain.isl, plain.shared_prefix_tokens) == (64, 0)
    with pytest.raises(UsageError, match="below --isl 64"):
        changed(alike, Changes(isl=[64]))
    both = replace(demo, workloads=(load, replace(load, shared_prefix_tokens=0)))
    assert len(changed(both, Changes(seed=3, shared_prefix_tokens=None)).workloads) == 2


def test_a_new_concurrency_gets_enough_requests_unless_their_number_is_given() -> None:
    demo = load_protocol("demo")
    (workload,) = changed(demo, Changes(concurrency=[32], isl=[64])).workloads
    assert workload.num_requests == MIN_ROUNDS * 32
    (workload,) = changed(demo, Changes(concurrency=[32], isl=[64], num_requests=5)).workloads
    assert workload.num_requests == 5


def test_a_rate_flag_opens_the_loop_and_inf_is_everything_at_once() -> None:
    demo = load_protocol("demo")
    loads = {
        (w.concurrency, w.request_rate)
        for w in changed(demo, Changes(request_rate=[2.0, float("inf")], num_requests=7, isl=[64])).workloads
    }
    assert loads == {(None, 2.0), (7, None)}
    capped = changed(demo, Changes(request_rate=[2.0], concurrency=[3])).workloads
    assert {(w.concurrency, w.request_rate) for w in capped} == {(3, 2.0)}


def test_limits_are_read_in_either_spelling() -> None:
    assert parse_slo("ttft:200,tpot:50") == SLO(ttft_ms=200, tpot_ms=50)
    assert parse_slo("e2el:5e3 ttft:1") == SLO(ttft_ms=1, e2e_ms=5000)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_slo, "itl:3", "unknown metric 'itl'; allowed are ttft, tpot, e2el"),
        (parse_slo, "ttft:fast", "'fast' is not a number above 0"),
        (parse_slo, "ttft:-1", "not a number above 0"),
        (parse_rates, "nan", "not a number above 0"),
        (parse_rates, "1,,2", "not a number above 0"),
        (lambda text: parse_numbers(text, "--isl"), "8,0", "--isl '8,0': '0' is not a whole number"),
        (lambda text: parse_numbers(text, "--isl"), "8,-1", "'-1' is not a whole number"),
        (lambda text: parse_numbers(text, "--isl"), "", "not a whole number"),
    ],
)
def test_wrong_flag_values_are_named(parse, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)
