"""What `install` looks at first, and what TensorRT engines can do instead."""

from __future__ import annotations

import sys
import types

import pytest
from fakes.trtllm_kv import v12, v13
from fakes.trtllm_kv.v12 import put_in

from trtkit.spec.errors import MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit_h2o.trtllm import WindowLowering, install, lower_for_engine, probe_h2o, usable_path
from trtkit_h2o.trtllm.probe import NEEDS

RESOURCES = f"{v12.TORCH}.pyexecutor.resource_manager"


@pytest.fixture(autouse=True)
def _forget_adapters():
    yield
    for name in [name for name in sys.modules if name.startswith("trtkit_h2o.trtllm.v1")]:
        del sys.modules[name]


def test_without_tensorrt_llm_one_finding_says_so():
    (finding,) = probe_h2o()
    assert not finding.ok
    assert "cannot be imported" in finding.detail
    assert usable_path([finding]) is None
    with pytest.raises(MissingDependencyError, match="or run H2O on the embedded engine"):
        install()


@pytest.mark.parametrize(("fake", "path"), [(v12, "v12"), (v13, "v13")])
def test_each_release_offers_its_own_path(monkeypatch, fake, path):
    put_in(monkeypatch, fake.modules())
    findings = probe_h2o()
    assert usable_path(findings) == path
    assert {f.path for f in findings if not f.ok} == {"v12", "v13"} - {path}
    assert len(findings) == 1 + sum(map(len, NEEDS.values()))


def test_names_that_have_moved_are_found_where_they_are_now(monkeypatch):
    put_in(monkeypatch, v13.later_modules())
    findings = probe_h2o()
    assert usable_path(findings) == "v13"
    details = {f.name: f.detail for f in findings if f.path == "v13"}
    assert details[f"{v12.TORCH}.attention_backend.trtllm:TrtllmAttention.forward"] == (
        f"queries: found in {v12.TORCH}.attention.backends.trtllm, takes q, metadata"
    )
    assert details["tensorrt_llm.llmapi.llm_args:TorchLlmArgs.model_fields"] == "the union of configurations: found"
    assert install() == "v13"
    moved = sys.modules[f"{v12.TORCH}.attention.backends.trtllm"]
    assert sys.modules["trtkit_h2o.trtllm.v13"].TrtllmAttention is moved.TrtllmAttention


@pytest.mark.parametrize("need", NEEDS["v12"], ids=lambda need: need.name)
def test_any_missing_name_is_reported_and_nothing_is_changed(monkeypatch, need):
    contents = v12.modules()
    module, _, attributes = need.name.partition(":")
    first, *rest = attributes.split(".")
    if rest:
        original = contents[module][first]
        kept = {k for k in vars(original) if not k.startswith("__")} | {"__init__", "__dataclass_fields__"}
        crippled = {k: v for k, v in vars(original).items() if k in kept - {rest[0]}}
        contents[module] = {**contents[module], first: type(first, (), crippled)}
    else:
        contents[module] = {k: v for k, v in contents[module].items() if k != first}
    put_in(monkeypatch, contents)
    broken = [f for f in probe_h2o() if f.path == "v12" and not f.ok]
    assert need.name in {f.name for f in broken}
    assert all(f.name.startswith(need.name) for f in broken)
    before = dict(vars(sys.modules[f"{v12.TORCH}.pyexecutor._util"]))
    with pytest.raises(UnsupportedError) as error:
        install()
    assert any(finding.detail in str(error.value) for finding in broken)
    assert "\n" not in str(error.value)
    assert dict(vars(sys.modules[f"{v12.TORCH}.pyexecutor._util"])) == before


def test_a_changed_signature_is_reported_with_what_it_takes(monkeypatch):
    class Renamed(v12.KVCacheManager):
        def rewind_kv_cache(self, request, count): ...

    put_in(monkeypatch, v12.modules(manager=Renamed))
    with pytest.raises(UnsupportedError, match=r"takes \(self, request, count\), without rewind_len"):
        install()


def test_a_field_that_a_step_no_longer_holds_is_named(monkeypatch):
    contents = v12.modules()
    backend = f"{v12.TORCH}.attention_backend.trtllm"
    metadata = types.SimpleNamespace(prepare=lambda self: None, num_seqs=0, request_ids=())
    contents[backend] = {**contents[backend], "TrtllmAttentionMetadata": metadata}
    put_in(monkeypatch, contents)
    (finding,) = [f for f in probe_h2o() if f.path == "v12" and not f.ok]
    assert finding.detail.startswith("what a step holds: TrtllmAttentionMetadata has no prompt_lens, seq_lens, ")


def test_a_release_that_lowers_configurations_before_the_dispatch_sees_them_is_refused(monkeypatch):
    """Everything else is there, and RocketKV's attention would run in place of ours."""

    class Lowering(v12.RocketSparseAttentionConfig):
        def to_sparse_params(self): ...

    contents = v12.modules()
    arguments = "tensorrt_llm.llmapi.llm_args"
    contents[arguments] = {**contents[arguments], "RocketSparseAttentionConfig": Lowering}
    put_in(monkeypatch, contents)
    with pytest.raises(UnsupportedError, match="has to_sparse_params, which"):
        install()


def test_a_bare_kwargs_promises_nothing(monkeypatch):
    class Vague(v12.KVCacheManager):
        def free_resources(self, *args, **kwargs): ...

    put_in(monkeypatch, v12.modules(manager=Vague))
    assert [f.name for f in probe_h2o() if f.path == "v12" and not f.ok] == [
        f"{RESOURCES}:KVCacheManager.free_resources"
    ]


def test_a_broken_installation_is_reported_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(MissingDependencyError, match="cannot be imported"):
        install()


def test_a_name_that_is_no_function_is_reported(monkeypatch):
    contents = v12.modules()
    contents[RESOURCES] = {"KVCacheManager": types.SimpleNamespace(**{**vars(v12.KVCacheManager), "get_buffers": 3})}
    put_in(monkeypatch, contents)
    details = [f.detail for f in probe_h2o() if f.name.endswith("V2.get_buffers") is False and "get_buffers" in f.name]
    assert details == ["the pool: is not callable"]


def test_engines_refuse_eviction_by_score_in_one_line():
    with pytest.raises(UnsupportedError) as error:
        lower_for_engine(parse_kv_policy("h2o:2048"), max_seq_len=8192, approximate=False)
    assert "--allow-approximate" in str(error.value)
    assert "\n" not in str(error.value)


def test_engines_offer_sinks_and_a_window_under_its_own_name():
    lowered = lower_for_engine(parse_kv_policy("h2o:25%,sinks=8"), max_seq_len=8192, approximate=True)
    assert lowered == WindowLowering(max_attention_window=(2048,), sink_token_length=8, fidelity=KVFidelity.WINDOW_ONLY)


def test_engines_need_nothing_for_a_full_cache():
    assert lower_for_engine(parse_kv_policy("full"), max_seq_len=8192, approximate=False) is None


def test_a_window_that_never_closes_is_refused():
    with pytest.raises(UsageError, match="nothing would be dropped"):
        lower_for_engine(parse_kv_policy("h2o:8192"), max_seq_len=8192, approximate=True)
