"""The packed array of a step: fields where they belong, buffers that wait for their own copies and no others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtkit.engine.device import staging
from trtkit.engine.device.staging import Field, Layout, Staging

CPU = torch.device("cpu")


def test_fields_come_out_on_the_device_as_they_went_in() -> None:
    layout = Layout(
        {"a": Field(shape=(3,)), "b": Field(shape=(2,), kind="float64"), "none": Field(shape=(0,)), "c": Field(shape=(2, 5))}
    )  # fmt: skip
    values = {"a": [1, -1, 7], "b": [0.1, 1e300], "none": [], "c": np.arange(10).reshape(2, 5)}
    sent = Staging(CPU, 8).send(layout, values)
    assert sent["a"].tolist() == [1, -1, 7]
    assert sent["b"].tolist() == [0.1, 1e300]
    assert sent["b"].dtype is torch.float64
    assert sent["none"].tolist() == []
    assert sent["c"].tolist() == np.arange(10).reshape(2, 5).tolist()
    assert {sent[name].dtype for name in "ac"} == {torch.int32}


def test_every_field_begins_at_sixteen_bytes() -> None:
    layout = Layout({name: Field(shape=(size,)) for name, size in (("a", 1), ("b", 3), ("c", 4), ("d", 5))})
    views = layout.tensors(torch.zeros(layout.words, dtype=torch.int32))
    assert [view.storage_offset() % 4 for view in views.values()] == [0, 0, 0, 0]


def test_memory_given_is_the_memory_used() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    sent = Staging(CPU, 8).send(Layout({"a": Field(shape=(3,))}), {"a": [4, 5, 6]}, memory)
    assert sent["a"].data_ptr() == memory.data_ptr()
    assert memory[:4].tolist() == [4, 5, 6, 0]


def test_a_step_left_in_flight_keeps_its_values_when_others_follow() -> None:
    host = Staging(CPU, 8)
    layout = Layout({"a": Field(shape=(2,))})
    sent = [host.send(layout, {"a": [step, -step]})["a"] for step in range(9)]
    assert [view.tolist() for view in sent] == [[step, -step] for step in range(9)]


def test_a_buffer_is_filled_again_only_behind_its_own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Logged:
        def __init__(self, number: int) -> None:
            self.number = number

        def wait(self) -> None:
            log.append(f"wait {self.number}")

    def fence(_: torch.device) -> Logged:
        log.append(f"copy {sum(entry.startswith('copy') for entry in log)}")
        return Logged(int(log[-1].split()[1]))

    monkeypatch.setattr(staging, "fence", fence)
    host = Staging(CPU, 8)
    for step in range(6):
        host.send(Layout({"a": Field(shape=(1,))}), {"a": [step]})
    assert log == ["copy 0", "copy 1", "copy 2", "copy 3", "wait 0", "copy 4", "wait 1", "copy 5"]


def test_a_larger_step_than_any_before_gets_a_larger_buffer() -> None:
    host = Staging(CPU, 4)
    sent = host.send(Layout({"a": Field(shape=(1000,))}), {"a": range(1000)})
    assert sent["a"].tolist() == list(range(1000))
    assert host.num_bytes >= 4000
