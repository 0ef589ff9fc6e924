"""Perplexity and next-token accuracy on held-out text, scored so that KV eviction acts.

Each document is cut into disjoint windows. A window's context is fed in pieces, an evicting engine evicts after each of
them, and the tokens after the context are scored on what is left. Every engine gets the same pieces, evicting or not,
so that windows pair. Text that does not fill a window is left out, the same for all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trtkit.backends.tokenizer import Tokenizer
from trtkit.quality.records import MetricSpec, QualitySource, eviction_check, quality_result, standard_error
from trtkit.quality.scoring import ScoringCounts
from trtkit.spec.engine import EngineInfo, Scorer, ScoreRequest, ScoreResult
from trtkit.spec.errors import InputError, MeasurementError, UsageError
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.result import DocumentOutcome, QualityResult

TASK = "heldout"
_BATCH = 16
_LOGPROB_SLACK = 1e-3
"""Rounding may put a log-probability a hair above zero; more than this is a broken engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutRules:
    """How text becomes windows, in tokens; part of a record's protocol.

    `limit` takes that many windows, spread evenly over all of them (0: all).
    """

    context: int = 768
    scored: int = 128
    piece: int = 64
    limit: int = 0

    def __post_init__(self) -> None:
        if self.context < 1 or self.scored < 1 or self.piece < 1 or self.limit < 0:
            raise UsageError(
                f"held-out windows: context={self.context}, scored={self.scored}, piece={self.piece} must be at least 1 "
                f"and limit={self.limit} at least 0"
            )

    @property
    def window(self) -> int:
        """Tokens of one window."""
        return self.context + self.scored

    @property
    def protocol(self) -> str:
        """One line that two records must share to be compared."""
        limit = f"; {self.limit} windows" if self.limit else ""
        return f"held-out text; context {self.context} in pieces of {self.piece}, then {self.scored} scored{limit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutWindow:
    """One window: `document` is "name/index/hash of its ids", `group` the text's name."""

    document: str
    group: str
    context_ids: tuple[int, ...]
    scored_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutScores:
    """The two records of one engine. Documents of `perplexity` are nats per token, of `accuracy` shares."""

    perplexity: QualityResult
    accuracy: QualityResult


def default_heldout() -> Path:
    """The shipped text: in an installed package, else in the checkout.

    Raises:
        InputError: neither has it.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "data" / "bench", package.parent / "bench"):
        if (root / "tiny_model" / "heldout").is_dir():
            return root / "tiny_model" / "heldout"
    raise InputError("the shipped held-out text is not installed; give a text file or a directory of .txt files")


def load_texts(path: Path) -> dict[str, str]:
    """Name -> text of one file, or of every `*.txt` in a directory, sorted by name.

    Raises:
        InputError: nothing there, or not UTF-8.
    """
    path = Path(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no .txt file in it")
    texts = {}
    for file in files:
        try:
            texts[file.stem] = file.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return texts


def read_windows(tokenizer: Tokenizer, rules: HeldoutRules, path: Path | None = None) -> list[HeldoutWindow]:
    """Windows of a text file or a directory of them; the shipped text where `path` is None."""
    texts = load_texts(default_heldout() if path is None else path)
    documents = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
    return heldout_windows(documents, rules, bos_id=tokenizer.bos_id)


def heldout_windows(
    documents: Mapping[str, Sequence[int]], rules: HeldoutRules, *, bos_id: int | None = None
) -> list[HeldoutWindow]:
    """Cut documents (name -> token ids without BOS) into disjoint windows; BOS, where there is one, opens each.

    Raises:
        InputError: no document is as long as one window.
    """
    prefix = () if bos_id is None else (bos_id,)
    step = rules.window - len(prefix)
    windows = [
        _window(name, index, (*prefix, *ids[start : start + step]), rules)
        for name, ids in documents.items()
        for index, start in enumerate(range(0, len(ids) - step + 1, step))
    ]
    if not windows:
        longest = max(map(len, documents.values()), default=0)
        raise InputError(
            f"the held-out text's longest document has {longest} tokens, and one window takes {step}; "
            "give longer text or smaller windows"
        )
    if rules.limit and rules.limit < len(windows):
        windows = [windows[i * len(windows) // rules.limit] for i in range(rules.limit)]
    return windows


def _window(name: str, index: int, ids: tuple[int, ...], rules: HeldoutRules) -> HeldoutWindow:
    identity = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:12]
    return HeldoutWindow(
        document=f"{name}/{index}/{identity}",
        group=name,
        context_ids=ids[: rules.context],
        scored_ids=ids[rules.context :],
    )


def score_heldout(
    scorer: Scorer,
    info: EngineInfo,
    windows: Sequence[HeldoutWindow],
    source: QualitySource,
    *,
    rules: HeldoutRules | None = None,
    progress: Progress = no_progress,
) -> HeldoutScores:
    """Score `windows` on an engine.

    Raises:
        UsageError: a window is longer than the engine's `max_seq_len`.
        MeasurementError: the engine refused a window or returned something that is no log-probability.
    """
    rules = rules or HeldoutRules()
    if rules.window > info.max_seq_len:
        raise UsageError(
            f"held-out windows of {rules.window} tokens do not fit the engine's max_seq_len {info.max_seq_len}; "
            "use smaller windows, or build with a larger max_seq_len"
        )
    requests = {window.document: _request(window, rules) for window in windows}
    state = _State()
    for start in range(0, len(windows), _BATCH):
        batch = [requests[window.document] for window in windows[start : start + _BATCH]]
        for result in scorer.score(batch):
            state.add(requests[result.request_id], result, info)
            progress("held-out text", len(state.nats), len(requests))
    if len(state.nats) != len(requests):
        raise MeasurementError(
            f"the engine left {len(requests) - len(state.nats)} of {len(requests)} held-out windows unanswered"
        )
    return _records(windows, state, source, info, rules)


def _request(window: HeldoutWindow, rules: HeldoutRules) -> ScoreRequest:
    ends = tuple(range(rules.piece, len(window.context_ids), rules.piece))
    return ScoreRequest(
        request_id=window.document,
        context_ids=window.context_ids,
        continuations=(window.scored_ids,),
        chunk_ends=(*ends, len(window.context_ids)),
    )


@dataclass(slots=True)
class _State:
    """Answers so far, by document."""

    nats: dict[str, float] = field(default_factory=dict)
    hits: dict[str, float] = field(default_factory=dict)
    counts: ScoringCounts = field(default_factory=ScoringCounts)

    def add(self, request: ScoreRequest, result: ScoreResult, info: EngineInfo) -> None:
        if result.error is not None:
            raise MeasurementError(f"the engine refused held-out window {result.request_id}: {result.error}")
        expected = len(request.continuations[0])
        if len(result.continuations) != 1 or len(result.continuations[0].logprobs) != expected:
            raise MeasurementError(f"the engine did not score the {expected} tokens of window {result.request_id}")
        score = result.continuations[0]
        for value in score.logprobs:
            if not (math.isfinite(value) and value <= _LOGPROB_SLACK):
                raise MeasurementError(f"the engine returned {value} as a log-probability; its logits are broken")
        self.nats[result.request_id] = -math.fsum(score.logprobs) / expected
        self.hits[result.request_id] = sum(score.is_greedy) / expected
        self.counts.contexts += 1
        self.counts.evictions += result.evictions
        self.counts.tokens_evicted += result.tokens_evicted
        self.counts.acted += result.evictions > 0 and not info.kv_policy.is_full


def _records(
    windows: Sequence[HeldoutWindow], state: _State, source: QualitySource, info: EngineInfo, rules: HeldoutRules
) -> HeldoutScores:
    checks = eviction_check(info, state.counts)

    def outcomes(values: Mapping[str, float]) -> list[DocumentOutcome]:
        return [DocumentOutcome(document=w.document, group=w.group, score=values[w.document]) for w in windows]

    nats = list(state.nats.values())
    perplexity = math.exp(math.fsum(nats) / len(nats))
    error = standard_error(nats)
    spec = MetricSpec(task=TASK, metric="perplexity", unit="ppl", better="lower", protocol=rules.protocol)
    return HeldoutScores(
        perplexity=quality_result(
            source,
            spec,
            outcomes(state.nats),
            counts=state.counts,
            checks=checks,
            # The error of exp(mean) to first order.
            aggregate=(perplexity, None if error is None else perplexity * error),
        ),
        accuracy=quality_result(
            source,
            MetricSpec(task=TASK, metric="acc", unit="fraction", protocol=rules.protocol),
            outcomes(state.hits),
            counts=state.counts,
            checks=checks,
        ),
    )
