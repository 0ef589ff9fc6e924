"""Eviction in the embedded engine against a dense masked model that shares no code with it."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.dense_oracle import (
    DenseOracle,
    greedy_with_eviction,
    h2o_policy,
    open_small,
    random_tensors,
    small_model,
)

from trtkit.engine import eviction
from trtkit.engine.eviction import prefill_piece
from trtkit.engine.open import open_tensors
from trtkit.kv.baselines import RandomKeep
from trtkit.kv.policy import CachedTokens
from trtkit.spec.dtype import DType
from trtkit.spec.engine import FinishReason, Request, Sampling, ScoreRequest
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

MODEL = small_model()
TENSORS = random_tensors(MODEL)
H2O = "h2o:24,sinks=2,recent=6,interval=4"
PIECE = 32


def prompt_of(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(3, MODEL.vocab_size, length).tolist())


def request(name, prompt, count=40, **options):
    return Request(request_id=name, prompt_ids=tuple(prompt), max_tokens=count, ignore_eos=True, **options)


def run(engine, *requests):
    """Tokens per request; every request must end by length."""
    tokens = {r.request_id: [] for r in requests}
    for event in engine.generate(requests):
        assert event.finish in (None, FinishReason.LENGTH), event
        tokens[event.request_id].append(event.token_id)
    engine.check()
    return tokens


@contextlib.contextmanager
def recorded_logits(engine):
    """The logits every token of a lone request was chosen from."""
    seen, original = [], engine._runner.logits

    def logits(hidden, tokens):
        result = original(hidden, tokens)
        seen.append(result.double().numpy())
        return result

    engine._runner.logits = logits
    yield seen
    del engine._runner.logits


def assert_equals_oracle(oracle, engine, prompt, count, piece=PIECE):
    """Same tokens, and the same logits at every step."""
    with recorded_logits(engine) as seen:
        tokens = run(engine, request("a", prompt, count))["a"]
    expected_tokens, expected = greedy_with_eviction(oracle, list(prompt), count, piece)
    np.testing.assert_allclose(np.concatenate(seen), np.stack(expected), atol=1e-4)
    assert tokens == expected_tokens


@pytest.mark.parametrize("scorer", ["sum", "mean", "decay"])
@pytest.mark.parametrize(
    "kv",
    [
        "h2o:24,sinks=2,recent=6,interval=4",
        "h2o:25,sinks=0,recent=1,interval=1",
        "h2o:31,sinks=4,recent=0,interval=3",
        "h2o:40,sinks=4,recent=16,interval=37",
        "h2o:1,sinks=0,recent=1,interval=1",
    ],
)
def test_logits_equal_the_masked_dense_model_at_every_step(kv, scorer):
    spec = parse_kv_policy(f"{kv},scorer={scorer}")
    with open_small(MODEL, TENSORS, spec.label) as engine:
        assert_equals_oracle(DenseOracle(MODEL, TENSORS, h2o_policy(spec, 4)), engine, prompt_of(150), 60)
        assert engine.kv_stats().evictions > 2


@pytest.mark.parametrize("group", [1, 4])
def test_logits_equal_the_dense_model_for_other_groups_and_head_sizes(group):
    model = small_model(num_heads=4, num_kv_heads=4 // group, head_dim=16, num_layers=3)
    tensors = random_tensors(model, seed=5)
    with open_small(model, tensors, H2O) as engine:
        oracle = DenseOracle(model, tensors, h2o_policy(parse_kv_policy(H2O), 4))
        assert_equals_oracle(oracle, engine, prompt_of(90), 30)


@pytest.mark.parametrize("length", range(20, 33))
def test_every_remainder_of_the_last_block_is_right(length):
    with open_small(MODEL, TENSORS, H2O) as engine:
        oracle = DenseOracle(MODEL, TENSORS, h2o_policy(parse_kv_policy(H2O), 4))
        assert_equals_oracle(oracle, engine, prompt_of(length), 20)


def test_a_prompt_below_the_budget_evicts_only_once_it_has_grown():
    with open_small(MODEL, TENSORS, H2O) as engine:
        oracle = DenseOracle(MODEL, TENSORS, h2o_policy(parse_kv_policy(H2O), 4))
        assert_equals_oracle(oracle, engine, prompt_of(5), 60)
        assert engine.kv_stats().evictions == (5 + 60 - 1 - 24) // 4


def test_sinks_and_window_equal_the_dense_model():
    def select(_mass, live, num_tokens):
        keep = live.copy()
        keep[3 : num_tokens - 21] = False
        return keep

    with open_small(MODEL, TENSORS, "window:24,sinks=3,interval=4") as engine:
        budget = parse_kv_policy("h2o:24,sinks=3,recent=21,interval=4")
        assert_equals_oracle(DenseOracle(MODEL, TENSORS, h2o_policy(budget, 4), select), engine, prompt_of(130), 40)


def test_random_keeps_what_its_hash_says_in_every_layer_and_head():
    policy = RandomKeep.from_spec(parse_kv_policy("random:24,sinks=2,recent=6,interval=4"))
    with open_small(MODEL, TENSORS, "random:24,sinks=2,recent=6,interval=4") as engine:
        run(engine, request("a", prompt_of(64), 1))
        observer = engine._runner.observer
        kept = []
        engine._runner.forget = lambda sequence: kept.append(observer._tracked[sequence].ledger.positions.clone())
        run(engine, request("b", prompt_of(64), 1))
    positions = torch.arange(64).expand(2, 2, 64)
    expected = policy.select(CachedTokens(positions=positions, mass=torch.zeros(2, 2, 64), num_tokens=64))
    assert torch.equal(kept[0].sort().values, expected.to(torch.int32))


def test_the_observation_window_scores_what_its_last_queries_see_now():
    """SnapKV's rule on a prompt of one piece: the window's own softmax mass over the prompt."""
    spec = parse_kv_policy("snapkv:24,sinks=0,recent=8,interval=4")
    with open_small(MODEL, TENSORS, spec.label) as engine:
        with recorded_logits(engine) as seen:
            run(engine, request("a", prompt_of(30), 4))
        # The oracle's mass is made the window's own by clearing it before the last 8 queries.
        oracle = DenseOracle(MODEL, TENSORS, h2o_policy(parse_kv_policy("h2o:24,sinks=0,recent=8,scorer=sum"), 4))
        oracle.step(list(prompt_of(30)[:22]))
        for layer in oracle.layers:
            layer.mass[:] = 0
        logits = oracle.step(list(prompt_of(30)[22:]))[-1]
        oracle.evict()
        for row in np.concatenate(seen):
            np.testing.assert_allclose(row, logits, atol=1e-4)
            logits = oracle.step([int(logits.argmax())])[-1]


def test_a_whole_budget_is_bit_identical_to_no_policy():
    prompts = [prompt_of(n, seed=n) for n in (7, 64, 100)]
    requests = [request(str(i), p, 40) for i, p in enumerate(prompts)]
    seen = {}
    for kv in ("full", "h2o:100%", "h2o:256", "snapkv:100%"):
        with open_small(MODEL, TENSORS, kv) as engine, recorded_logits(engine) as logits:
            tokens = run(engine, *requests)
            seen[kv] = (tokens, np.concatenate(logits).tobytes())
            assert engine.kv_stats().evictions == engine.kv_stats().side_bytes == 0
    assert seen["h2o:100%"] == seen["h2o:256"] == seen["snapkv:100%"] == seen["full"]


def test_watching_without_evicting_changes_no_logit():
    """A sequence that is scored but has not yet reached its budget computes what an unwatched one does."""
    logits = {}
    for kv in ("full", "h2o:40,sinks=2,recent=6,interval=4"):
        with open_small(MODEL, TENSORS, kv) as engine, recorded_logits(engine) as seen:
            run(engine, request("a", prompt_of(10), 60))
            logits[kv] = np.concatenate(seen)[:34]
    assert np.array_equal(*logits.values())


def test_a_share_is_one_of_each_requests_own_prompt_and_output():
    loads = {"short": (prompt_of(50, 1), 30), "long": (prompt_of(110, 2), 20)}
    kv = "sinks=2,recent=6,interval=4"
    half = open_small(MODEL, TENSORS, f"h2o:50%,{kv}")
    shares = run(half, *(request(name, *load) for name, load in loads.items()))
    for name, (prompt, count) in loads.items():
        exact = open_small(MODEL, TENSORS, f"h2o:{(len(prompt) + count) // 2},{kv}")
        assert shares[name] == run(exact, request(name, prompt, count))[name]
        assert exact.kv_stats().evictions > 0


def test_the_cache_never_holds_more_than_budget_and_piece():
    with open_small(MODEL, TENSORS, H2O) as engine:
        run(engine, request("a", prompt_of(200), 40))
        assert engine.kv_stats().blocks_peak == (24 + PIECE) // 4
        assert prefill_piece(h2o_policy(parse_kv_policy(H2O), 4).budget, engine._limits) == PIECE


def test_a_piece_finds_room_beside_a_full_batch_of_decoding_requests():
    budget = h2o_policy(parse_kv_policy(H2O), 4).budget
    assert prefill_piece(budget, Limits(max_num_tokens=32, max_batch_size=8)) == 25
    assert prefill_piece(budget, Limits(max_num_tokens=4, max_batch_size=8)) == 1
    assert prefill_piece(replace(budget, tokens=4096), Limits()) == 128


def test_tail_blocks_are_free_before_the_next_step():
    with open_small(MODEL, TENSORS, H2O) as engine:
        used = []
        for _ in engine.generate([request("a", prompt_of(64), 12)]):
            used.append(engine.kv_stats().blocks_used)
        stats = engine.kv_stats()
    assert used[0] == 24 // 4, "the prompt's 16 blocks were cut to 6 in the step that ended it"
    assert max(used) == 24 // 4 + 1
    assert stats.blocks_freed == 10 + 2
    assert stats.tokens_evicted == 40 + 2 * 4


def test_freed_blocks_let_more_requests_run_at_once():
    requests = [request(str(i), prompt_of(60, seed=i), 60) for i in range(8)]
    peak = {}
    for kv in ("full", "h2o:30,sinks=2,recent=6,interval=4"):
        with open_small(MODEL, TENSORS, kv, blocks=64) as engine:
            run(engine, *requests)
            peak[kv] = engine.kv_stats()
    assert peak["full"].preemptions > 0
    full, evicting = (stats.requests_peak for stats in peak.values())
    assert evicting > full


def mixed_requests():
    policies = [None, "full", "h2o:12,sinks=1,recent=4,interval=3", "window:20", "snapkv:24,recent=8", "random:18"]
    lengths = [30, 100, 77, 64, 5, 128]
    return [
        request(str(i), prompt_of(n, seed=i), 30 + i, kv=kv and parse_kv_policy(kv))
        for i, (kv, n) in enumerate(zip(policies, lengths, strict=True))
    ]


def alone(requests):
    tokens = {}
    for one in requests:
        with open_small(MODEL, TENSORS, H2O) as engine:
            tokens |= run(engine, one)
    return tokens


def test_a_request_alone_writes_what_it_writes_among_others_with_other_policies():
    with open_small(MODEL, TENSORS, H2O) as engine:
        assert run(engine, *mixed_requests()) == alone(mixed_requests())


@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (2, 0, 5, 1, 4, 3)])
def test_the_order_of_requests_changes_nobodys_tokens(order):
    requests = mixed_requests()
    with open_small(MODEL, TENSORS, H2O) as engine:
        assert run(engine, *[requests[i] for i in order]) == alone(requests)


def test_requests_that_join_late_count_their_own_intervals():
    requests = mixed_requests()

    def trickle():
        for one in requests:
            yield one
            yield from itertools.repeat(None, 7)

    with open_small(MODEL, TENSORS, H2O) as engine:
        tokens = {r.request_id: [] for r in requests}
        for event in engine.generate(trickle()):
            tokens[event.request_id].append(event.token_id)
    assert tokens == alone(requests)


def test_a_preempted_request_writes_what_it_would_have_written():
    requests = [request(str(i), prompt_of(10 + 25 * i, seed=i), 90) for i in range(4)]
    with open_small(MODEL, TENSORS, "h2o:60,sinks=2,recent=6,interval=8", blocks=48) as engine:
        crowded = run(engine, *requests)
        stats = engine.kv_stats()
    assert stats.preemptions > 0
    assert stats.evictions > 0
    for one in requests:
        with open_small(MODEL, TENSORS, "h2o:60,sinks=2,recent=6,interval=8") as engine:
            assert run(engine, one)[one.request_id] == crowded[one.request_id]


def test_the_same_run_twice_evicts_and_writes_the_same():
    def once():
        with open_small(MODEL, TENSORS, H2O) as engine:
            sampled = request("s", prompt_of(90), 40, sampling=Sampling(temperature=1.0, seed=7))
            return run(engine, sampled, *mixed_requests()), engine.kv_stats()

    assert once() == once()


def test_cancelling_in_the_middle_frees_everything_once():
    with open_small(MODEL, TENSORS, H2O) as engine:
        requests = mixed_requests()
        ended = {}
        for event in engine.generate(requests):
            if event.index == 9:
                engine.cancel(event.request_id)
            if event.finish is not None:
                ended[event.request_id] = event.finish
        engine.check()
        stats = engine.kv_stats()
    assert set(ended.values()) == {FinishReason.CANCELLED}
    assert stats.blocks_used == 0
    assert not engine._runner.observer._tracked


def test_evicting_one_request_leaves_the_others_blocks_and_logits_alone():
    quiet = request("quiet", prompt_of(40, seed=3), 40, kv=parse_kv_policy("full"))
    with open_small(MODEL, TENSORS, H2O) as engine:
        expected = run(engine, quiet)["quiet"]
    with open_small(MODEL, TENSORS, H2O) as engine:
        cache, scheduler = engine._runner.cache, engine._scheduler
        before = {}
        trim = scheduler.trim

        def watched(sequence):
            for other in scheduler.running:
                if other.request_id == "quiet":
                    keys, _ = cache.read(0, other.block_table, other.cache_len)
                    known = before.get("quiet")
                    if known is not None:
                        assert torch.equal(keys[:, : known.shape[1]], known)
                    before["quiet"] = keys.clone()
            return trim(sequence)

        scheduler.trim = watched
        tokens = run(engine, quiet, request("busy", prompt_of(100), 60))
    assert before, "the busy request never evicted beside the quiet one"
    assert tokens["quiet"] == expected


def test_poison_in_free_blocks_is_never_read():
    """Every block that is freed is filled with NaN at once; one read of it would poison a logit."""
    requests = [request(str(i), prompt_of(40 + 13 * i, seed=i), 50) for i in range(6)]
    with open_small(MODEL, TENSORS, H2O, blocks=48) as engine:
        pool, cache = engine._scheduler.pool, engine._runner.cache
        free = pool.free

        def poisoning(blocks, owner):
            blocks = list(blocks)
            free(blocks, owner)
            for layer in cache.layers:
                layer[blocks] = torch.nan

        pool.free = poisoning
        for layer in cache.layers:
            layer[: cache.num_blocks] = torch.nan
        crowded = run(engine, *requests)
        assert engine.kv_stats().evictions > 0
    for one in requests:
        with open_small(MODEL, TENSORS, H2O) as engine:
            assert run(engine, one)[one.request_id] == crowded[one.request_id]


def test_every_rotated_key_stands_where_its_position_says():
    """After many evictions: the same token at the same position has the same key in an engine that kept all."""
    rotated = {}
    for kv in (H2O, "full"):
        with open_small(small_model(num_layers=1), random_tensors(small_model(num_layers=1)), kv) as engine:
            # One layer: its keys depend on token and position alone, so the two engines can be compared.
            events = engine.generate([request("a", prompt_of(120), 2, kv=None)])
            next(events)
            sequence = engine._scheduler.running[0]
            rotated[kv] = engine._runner.cache.read(0, sequence.block_table, sequence.cache_len)
            if kv != "full":
                positions = engine._runner.observer._tracked[sequence].ledger.positions[0].long()
            events.close()
    for kept, everything in zip(rotated[H2O], rotated["full"], strict=True):
        expected = everything.gather(1, positions[:, :, None].expand(-1, -1, everything.shape[2]))
        torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)


def test_positions_keep_counting_past_the_budget():
    with open_small(MODEL, TENSORS, H2O) as engine:
        events = engine.generate([request("a", prompt_of(100), 30)])
        for _ in range(20):
            next(events)
        sequence = engine._scheduler.running[0]
        tracked = engine._runner.observer._tracked[sequence]
        with torch.inference_mode():
            tracked.list_tokens(sequence.num_tokens)
        ledger = tracked.ledger
        assert sequence.num_tokens == 119
        assert sequence.cache_len == ledger.length < 30
        assert (ledger.positions.amax(-1) == 118).all()
        assert (ledger.positions.sort(-1).values[..., :2] == torch.tensor([0, 1])).all(), "sinks stay"
        events.close()


def test_mass_in_the_engine_is_conserved_while_nothing_is_evicted():
    with open_small(MODEL, TENSORS, "h2o:90,sinks=2,recent=6,interval=32,scorer=sum") as engine:
        events = engine.generate([request("a", prompt_of(50), 80)])
        for _ in range(33):
            next(events)
        sequence = engine._scheduler.running[0]
        tracked = engine._runner.observer._tracked[sequence]
        seen = sequence.num_tokens - tracked.pending
        total = tracked.ledger.mass.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, seen * MODEL.group_size), rtol=1e-5, atol=1e-4)
        assert tracked.pending < 32 < sequence.num_tokens - 50 + 1
        events.close()


def test_scores_do_not_depend_on_how_a_prompt_is_cut():
    """Chunks of any size leave the same mass, as long as nothing is evicted in between."""
    masses = []
    for ends in ((), (10, 20, 30), (1, 2, 39), (17,)):
        with open_small(MODEL, TENSORS, "h2o:40,sinks=2,recent=6,interval=4,scorer=decay") as engine:
            observer = engine._runner.observer
            score = ScoreRequest(
                request_id="a", context_ids=prompt_of(40), continuations=((5, 6, 7, 8, 9, 10, 11),), chunk_ends=ends
            )
            # A longer request is one that can outgrow its budget, so that it is watched at all.
            admit, end_step = observer.admit, observer.end_step
            observer.admit = lambda s, admit=admit: (setattr(s, "max_new_tokens", 60), admit(s))

            def record(batch, observer=observer, end_step=end_step):
                end_step(batch)
                (row,) = batch.rows
                if row.observed and row.sequence.num_tokens == 40:
                    tracked = observer._tracked[row.sequence]
                    observer._flush(row.sequence, tracked)
                    masses.append(tracked.ledger.mass.clone())

            observer.end_step = record
            list(engine.score([score]))
    assert len(masses) == 4
    for mass in masses[1:]:
        torch.testing.assert_close(mass, masses[0], rtol=1e-4, atol=1e-5)


def test_scoring_evicts_after_each_piece_and_scores_on_what_is_left():
    context, continuation, ends = prompt_of(90), prompt_of(4, seed=9), (40, 70)
    with open_small(MODEL, TENSORS, H2O) as engine:
        request = ScoreRequest(
            request_id="a", context_ids=context, continuations=(continuation, (7,)), chunk_ends=ends, top_logprobs=96
        )
        (result,) = engine.score([request])
    oracle = DenseOracle(MODEL, TENSORS, h2o_policy(parse_kv_policy(H2O), 4))
    logits = None
    for start, end in itertools.pairwise((0, *ends, 90)):
        logits = oracle.step(list(context[start:end]))[-1]
        oracle.evict()
    rows = [logits, *oracle.step(list(continuation[:-1]))]
    for row, logprob, token in zip(rows, result.continuations[0].logprobs, continuation, strict=True):
        expected = row - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert logprob == pytest.approx(expected[token], abs=1e-4)
    assert result.evictions == 3
    assert result.tokens_evicted == 90 - 24
    assert result.error is None


def test_scored_continuations_do_not_see_each_other():
    context = prompt_of(90)
    many = tuple(prompt_of(5, seed=s) for s in range(4))
    with open_small(MODEL, TENSORS, H2O) as engine:
        (together,) = engine.score(
            [ScoreRequest(request_id="a", context_ids=context, continuations=many, chunk_ends=(40,))]
        )
        for tokens, expected in zip(many, together.continuations, strict=True):
            (alone_,) = engine.score(
                [ScoreRequest(request_id="b", context_ids=context, continuations=(tokens,), chunk_ends=(40,))]
            )
            assert alone_.continuations[0].logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_scored_continuations_leave_no_trace_in_the_ledger():
    masses = []
    for count in (1, 30):
        with open_small(MODEL, TENSORS, H2O) as engine:
            request = ScoreRequest(
                request_id="a", context_ids=prompt_of(50), continuations=(prompt_of(count, seed=2),), chunk_ends=(30,)
            )
            observer = engine._runner.observer
            forget = engine._runner.forget

            def keep(sequence, observer=observer, forget=forget):
                masses.append(observer._tracked[sequence].ledger.mass.clone())
                forget(sequence)

            engine._runner.forget = keep
            list(engine.score([request]))
    assert torch.equal(*masses)


def test_layers_choose_by_their_own_scores():
    with open_small(MODEL, TENSORS, H2O) as engine:
        events = engine.generate([request("a", prompt_of(100), 5)])
        next(events)
        first, second = next(iter(engine._runner.observer._tracked.values())).ledger.positions.sort(-1).values
        events.close()
    assert not torch.equal(first, second)


def test_side_bytes_are_what_ledgers_and_rings_hold_and_go_with_their_request():
    with open_small(MODEL, TENSORS, H2O) as engine:
        events = engine.generate([request("a", prompt_of(100), 5), request("b", prompt_of(100, seed=1), 20)])
        seen = []
        for _ in events:
            observer = engine._runner.observer
            ledgers = sum(t.ledger.num_bytes for t in observer._tracked.values())
            seen.append((len(observer._tracked), ledgers, engine.kv_stats().side_bytes))
        ring = 32 * 2 * MODEL.num_layers * MODEL.num_heads * MODEL.head_dim * 4
    assert max(count for count, _, _ in seen) == 2
    assert (2, 2 * 2 * 2 * (24 + PIECE) * 8) in {(count, held) for count, held, _ in seen}
    assert max(total for _, _, total in seen) == 2 * 2 * 2 * (24 + PIECE) * 8 + ring


def test_a_bfloat16_cache_evicts_and_moves_rows_bit_by_bit():
    limits = Limits(max_batch_size=4, max_num_tokens=128, max_seq_len=256, tokens_per_block=4, kv_memory_bytes=1 << 20)
    spec = parse_kv_policy(H2O)
    with open_tensors(MODEL, TENSORS, limits=limits, kv_policy=spec, dtype=DType.BF16) as engine:
        events = engine.generate([request("a", prompt_of(100), 20)])
        cache = engine._runner.cache
        observed = []
        move = eviction.move_slots

        def checked(cache, table, moves):
            before = [cache.read(layer, table, 24 + PIECE)[1] for layer in range(2)]
            move(cache, table, moves)
            after = [cache.read(layer, table, 24)[1] for layer in range(2)]
            for old, new in zip(before, after, strict=True):
                rows = {tuple(row) for head in old.tolist() for row in head}
                assert all(tuple(row) in rows for head in new.tolist() for row in head)
            observed.append(len(moves.rows))

        eviction.move_slots = checked
        try:
            next(events)
        finally:
            eviction.move_slots = move
        assert cache.layers[0].dtype is torch.bfloat16
        assert sum(observed) > 0
        events.close()


@pytest.mark.parametrize(
    ("kv", "reason"),
    [
        ("h2o:300", "above max_seq_len 256"),
        ("nonsense:50%", "unknown KV policy 'nonsense'"),
        ("h2o:24,scorer=max", "unknown scorer 'max'"),
        ("h2o:4,sinks=3,recent=1,scorer=none", "unknown scorer 'none'"),
        ("window:20,scorer=sum", "has no scorer"),
        ("window:20,sinks=4,recent=4", "leave recent out"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_at_open_and_per_request_alike(kv, reason):
    with pytest.raises(UsageError, match=reason):
        open_small(MODEL, TENSORS, kv)
    with open_small(MODEL, TENSORS, H2O) as engine:
        fine = request("fine", prompt_of(60), 20)
        expected = run(engine, fine)["fine"]
        events = list(engine.generate([fine, request("bad", prompt_of(60), 20, kv=parse_kv_policy(kv))]))
    refused = [e for e in events if e.request_id == "bad"]
    assert [e.finish for e in refused] == [FinishReason.ERROR]
    assert reason in (refused[0].error or "")
    assert [e.token_id for e in events if e.request_id == "fine"] == expected


@pytest.mark.parametrize("kv", ["h2o:0", "h2o:-5", "h2o:101%", "h2o:0%", "h2o:10,sinks=6,recent=6", "h2o:9,interval=0"])
def test_budgets_that_cannot_be_are_refused_where_they_are_read(kv):
    with pytest.raises(UsageError, match=r"must be|below sinks"):
        parse_kv_policy(kv)


def test_a_sliding_window_model_is_held_inside_its_window_where_nothing_slides():
    model = small_model(sliding_window=64)
    with pytest.raises(UsageError, match="above max_seq_len 64"):
        open_small(model, TENSORS, "h2o:100")
    with open_small(model, TENSORS, H2O) as engine:
        assert engine.info.max_seq_len == 64
        (event,) = engine.generate([request("a", prompt_of(70), 5)])
        assert event.finish is FinishReason.ERROR


def test_a_broken_model_with_nan_scores_ends_its_requests_and_no_other():
    good = [t if t != 5 else 6 for t in prompt_of(90)]
    bad = [*good[:20], 5, *good[21:]]
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    with open_small(MODEL, tensors, H2O) as engine:
        engine._runner.weights.embedding[5] = torch.nan
        expected = run(engine, request("good", good, 30))["good"]
        events = list(engine.generate([request("bad", bad, 30), request("good", good, 30)]))
        engine.check()
    assert [e.finish for e in events if e.request_id == "bad"] == [FinishReason.ERROR]
    assert [e.token_id for e in events if e.request_id == "good"] == expected
