"""Random loads played on an engine: what each request was told, with the pool's books proved after every event."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol, TypeVar

from trtkit.engine.loop import EmbeddedEngine
from trtkit.spec.engine import FinishReason, Request


class Work(Protocol):
    """One request of a load: it comes after `waits` empty pulls and is cancelled at token `cancel_after`, if at all."""

    @property
    def waits(self) -> int: ...

    @property
    def cancel_after(self) -> int | None: ...


W = TypeVar("W", bound=Work)


class Told(NamedTuple):
    """All that a request was told."""

    tokens: list[int]
    finish: FinishReason
    error: str | None


def play(
    engine: EmbeddedEngine,
    load: Seq[W],
    request: Callable[[int, W], Request],
    after_event: Callable[[], None] = lambda: None,
) -> dict[str, Told]:
    """Run a load to its end; request number i is called `str(i)`. Each ends exactly once, and no block stays in use."""
    tokens: dict[str, list[int]] = {}
    ended: dict[str, Told] = {}
    for event in engine.generate(_arrivals(load, request)):
        engine.check()
        after_event()
        assert event.request_id not in ended, "nothing follows a request's end"
        told = tokens.setdefault(event.request_id, [])
        assert event.index == len(told)
        if event.token_id is not None:
            told.append(event.token_id)
        if event.finish is not None:
            ended[event.request_id] = Told(told, event.finish, event.error)
        elif load[int(event.request_id)].cancel_after == event.index:
            engine.cancel(event.request_id)
    engine.check()
    assert len(ended) == len(load)
    stats = engine.kv_stats()
    assert stats.blocks_used == stats.requests_running == stats.requests_waiting == 0
    return ended


def assert_same(load: Seq[Work], plain: Mapping[str, Told], other: Mapping[str, Told]) -> None:
    """Tokens and ends are equal; of a cancelled request, what both runs told before the cancellation took effect."""
    for name, expected in plain.items():
        if load[int(name)].cancel_after is None:
            assert other[name] == expected
        else:
            shared = min(len(expected.tokens), len(other[name].tokens))
            assert other[name].tokens[:shared] == expected.tokens[:shared]


def _arrivals(load: Seq[W], request: Callable[[int, W], Request]) -> Iterator[Request | None]:
    for index, work in enumerate(load):
        yield from [None] * work.waits
        yield request(index, work)
