"""What `trtkit generate` and `trtkit chat` do: one request from its flags, and a conversation at a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtkit.backends import open_engine
from trtkit.backends.tokenizer import Tokenizer, load_tokenizer
from trtkit.spec.bundle import EngineBundle, open_bundle
from trtkit.spec.engine import Engine, FinishReason, Request, Sampling, TokenEvent
from trtkit.spec.errors import EngineError, InputError, UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.speculation import OFF, speculation_label
from trtkit.spec.units import NS_PER_MS

EXIT_WORDS = ("/exit", "/quit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """The answer to one prompt; `text` is None without a tokenizer. Times are measured, the first token's included."""

    engine: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str | None
    finish: FinishReason
    kv_policy: str
    evictions: int | None
    elapsed_ms: float
    speculation: str = OFF
    draft_tokens: int | None = 0
    accepted_tokens: int | None = 0

    @property
    def readable(self) -> str:
        """Text, or ids where there is no text."""
        return self.text if self.text is not None else ",".join(map(str, self.output_ids))


def parse_ids(flag: str, text: str) -> tuple[int, ...]:
    """Token ids separated by commas or spaces.

    Raises:
        UsageError: naming the flag and the part that is not an id.
    """
    ids: list[int] = []
    for part in text.replace(",", " ").split():
        if not part.isdecimal():
            raise UsageError(f"{flag}: {part!r} is not a token id; give ids like 1,2,3")
        ids.append(int(part))
    return tuple(ids)


def generate(
    path: Path,
    *,
    prompt: str | None,
    prompt_ids: tuple[int, ...] | None,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    kv: str | None = None,
    speculate: str | None = None,
) -> Generated:
    """Open the engine, run one request, close it.

    Raises:
        UsageError: not exactly one prompt, or the engine refused the request.
    """
    if (prompt is None) == (prompt_ids is None):
        raise UsageError("give one prompt: --prompt TEXT or --prompt-ids 1,2,3")
    bundle = open_bundle(path)
    policy = None if kv is None else parse_kv_policy(kv)
    tokenizer = _tokenizer(bundle.tokenizer_dir, required=prompt is not None)
    if prompt is not None and tokenizer is not None:
        prompt_ids = tuple(tokenizer.encode(prompt))
    request = Request(
        request_id="generate", prompt_ids=prompt_ids or (), max_tokens=max_tokens, sampling=sampling,
        stop_ids=stop_ids, ignore_eos=ignore_eos, kv=policy,
    )  # fmt: skip
    overrides: dict[str, Any] = {} if speculate is None else {"speculation": speculate}
    with open_engine(path, **overrides) as engine:
        events, elapsed_ms = _timed(engine, request)
        info, stats = engine.info, engine.kv_stats()
    output, finish = _answer(events)
    return Generated(
        engine=bundle.name,
        prompt_ids=request.prompt_ids,
        output_ids=output,
        text=None if tokenizer is None else tokenizer.decode(output),
        finish=finish,
        kv_policy=(policy or info.kv_policy).label,
        evictions=stats.evictions,
        elapsed_ms=elapsed_ms,
        speculation=speculation_label(info.speculation),
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
    )


def _answer(events: list[TokenEvent]) -> tuple[tuple[int, ...], FinishReason]:
    """The tokens and why they ended; a refusal is an error of usage."""
    last = events[-1]
    if last.finish is FinishReason.ERROR or last.finish is None:
        raise UsageError(last.error or "the engine ended the request without a reason")
    return tuple(event.token_id for event in events if event.token_id is not None), last.finish


def _timed(engine: Engine, request: Request) -> tuple[list[TokenEvent], float]:
    import time

    start_ns = time.monotonic_ns()
    events = list(engine.generate([request]))
    return events, (events[-1].time_ns - start_ns) / NS_PER_MS


def _tokenizer(directory: Path, *, required: bool) -> Tokenizer | None:
    try:
        return load_tokenizer(directory)
    except InputError:
        if required:
            raise
        return None


@dataclass(kw_only=True, slots=True)
class Chat:
    """A conversation: `ask` streams the answer's text; Ctrl-C while it streams ends the answer, not the chat."""

    engine: Engine
    tokenizer: Tokenizer
    max_tokens: int
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, write: Callable[[str], object]) -> None:
        """Stream the answer to `text` into `write`, in pieces that are whole characters.

        Raises:
            EngineError: the engine refused the conversation (too long, for one); the question is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        request = Request(
            request_id=f"turn-{len(self.messages)}",
            prompt_ids=tuple(self.tokenizer.chat_ids(self.messages)),
            max_tokens=self.max_tokens,
            sampling=self.sampling,
        )
        ids: list[int] = []
        shown = ""
        events = iter(self.engine.generate([request]))
        try:
            for event in events:
                if event.finish is FinishReason.ERROR:
                    self.messages.pop()
                    raise EngineError(f"{event.error}; /exit leaves the chat")
                if event.token_id is not None:
                    ids.append(event.token_id)
                piece, shown = _next_piece(self.tokenizer, ids, shown, final=event.finish is not None)
                write(piece)
        except KeyboardInterrupt:
            self.engine.cancel(request.request_id)
            for _ in events:
                pass
        self.messages.append({"role": "assistant", "content": shown})


def _next_piece(tokenizer: Tokenizer, ids: Sequence[int], shown: str, *, final: bool) -> tuple[str, str]:
    """Text not shown yet; a character whose bytes are still incomplete waits for the next token."""
    text = tokenizer.decode(ids)
    if not final:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    return (text[len(shown) :], text) if text.startswith(shown) else ("", shown)


def _open_to_talk(bundle: EngineBundle) -> Engine:
    """Every question brings the conversation so far with it; where its blocks may be kept, that is not computed again."""
    plan = bundle.manifest.plan
    keeps = {"enable_block_reuse": True} if plan.target == "embedded" and plan.kv.is_full else {}
    return open_engine(bundle.path, **keeps)


def chat(
    path: Path, *, max_tokens: int, sampling: Sampling, read: Callable[[str], str], write: Callable[[str], object]
) -> None:
    """Talk until /exit or the end of input. `read` takes a prompt and returns a line, `write` prints without a newline."""
    bundle = open_bundle(path)
    tokenizer = load_tokenizer(bundle.tokenizer_dir)
    with _open_to_talk(bundle) as engine:
        conversation = Chat(engine=engine, tokenizer=tokenizer, max_tokens=max_tokens, sampling=sampling)
        write(f"{bundle.name}: /exit leaves, Ctrl-C ends an answer\n")
        for line in _lines(lambda: read("> ")):
            try:
                conversation.ask(line, write)
                write("\n")
            except EngineError as error:
                write(f"{error}\n")


def chat_json(
    path: Path, *, max_tokens: int, sampling: Sampling, read: Callable[[str], str], write: Callable[[str], object]
) -> None:
    """The same for programs: a question per line in, one JSON object per line out: `user`, `assistant`, `error`."""
    bundle = open_bundle(path)
    tokenizer = load_tokenizer(bundle.tokenizer_dir)
    with _open_to_talk(bundle) as engine:
        conversation = Chat(engine=engine, tokenizer=tokenizer, max_tokens=max_tokens, sampling=sampling)
        for line in _lines(lambda: read("")):
            pieces: list[str] = []
            error = None
            try:
                conversation.ask(line, pieces.append)
            except EngineError as refusal:
                error = str(refusal)
            write(json.dumps({"user": line, "assistant": "".join(pieces), "error": error}, sort_keys=True) + "\n")


def _lines(read: Callable[[], str]) -> Iterator[str]:
    """Questions, until an exit word or the end of input."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line in EXIT_WORDS:
            return
        if line:
            yield line
