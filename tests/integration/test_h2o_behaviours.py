"""Fifty behaviours an eviction engine must have, and the tests that hold each of them here.

A string instead of test names says why a behaviour does not apply to this engine.
"""

from __future__ import annotations

import ast
from pathlib import Path

BEHAVIOURS: dict[str, tuple[str, ...] | str] = {
    "01 a budget is never exceeded after an eviction": (
        "test_it_keeps_exactly_the_budget_ascending_in_every_row",
        "test_the_cache_never_holds_more_than_budget_and_piece",
    ),
    "02 a budget is never under-filled": ("test_it_keeps_exactly_the_budget_ascending_in_every_row",),
    "03 the recent window is live, right after an append too": (
        "test_sinks_and_the_recent_window_always_stay",
        "test_positions_keep_counting_past_the_budget",
    ),
    "04 sinks never leave": (
        "test_a_sink_that_scores_nothing_stays",
        "test_positions_keep_counting_past_the_budget",
    ),
    "05 exactly the heaviest survive, the boundary token competes at once": (
        "test_exactly_the_heaviest_of_the_unprotected_tokens_survive",
        "test_the_token_that_just_left_the_recent_window_competes_at_once",
    ),
    "06 ties follow a documented rule": (
        "test_equal_scores_keep_the_newer_token",
        "test_equal_scores_keep_the_newer_token_whatever_the_slot_order",
    ),
    "07 an evicted position never comes back": (
        "test_the_oracle_never_brings_an_evicted_position_back",
        "test_logits_equal_the_masked_dense_model_at_every_step",
    ),
    "08 edge counts: no heavy, no recent, a budget of one, too much recent": (
        "test_a_window_without_heavy_hitters_is_the_window",
        "test_a_budget_of_one_keeps_the_heaviest",
        "test_a_budget_below_its_protected_tokens_is_refused",
    ),
    "09 NaN and infinity select nothing out of range": (
        "test_nan_is_evicted_first_and_displaces_nothing",
        "test_masses_that_are_no_numbers_select_nothing_out_of_range",
        "test_a_broken_model_with_nan_scores_ends_its_requests_and_no_other",
    ),
    "10 a short prompt is left alone": (
        "test_a_prompt_below_the_budget_evicts_only_once_it_has_grown",
        "test_a_whole_budget_is_bit_identical_to_no_policy",
    ),
    "11 column sums from the log-sum-exp equal dense ones": (
        "test_scored_mass_equals_dense_column_sums_over_ragged_lengths",
        "test_bfloat16_caches_score_within_a_hundredth",
        "test_gathered_mass_equals_the_paged_twin",
    ),
    "12 mass is conserved": (
        "test_mass_of_a_step_is_the_group_size_per_query_and_kv_head",
        "test_mass_in_the_engine_is_conserved_while_nothing_is_evicted",
        "test_the_oracles_mass_is_conserved",
    ),
    "13 one query scores the whole row": ("test_the_oracle_keeps_a_single_query_from_scoring_one_key_alone",),
    "14 decode accumulates what a prefill of the same tokens does": (
        "test_scores_do_not_depend_on_how_a_prompt_is_cut",
        "test_the_oracle_scores_a_prompt_as_it_scores_the_same_tokens_one_by_one",
    ),
    "15 any chunking scores alike; with evictions between, it equals the dense model with that schedule": (
        "test_scores_do_not_depend_on_how_a_prompt_is_cut",
        "test_scoring_evicts_after_each_piece_and_scores_on_what_is_left",
    ),
    "16 a KV head's score is the sum over its own group": (
        "test_scores_ignore_the_order_of_query_heads_inside_a_group_only",
        "test_logits_equal_the_dense_model_for_other_groups_and_head_sizes",
    ),
    "17 mean and decay count queries, not batches": (
        "test_the_mean_scorer_divides_by_the_queries_that_could_see_the_key",
        "test_decayed_mass_does_not_depend_on_how_queries_are_batched",
    ),
    "18 scores move with their tokens, new ones start clean": (
        "test_mass_and_positions_move_with_their_tokens",
        "test_new_slots_start_with_no_mass_of_a_former_occupant",
    ),
    "19 padding and drafts add no score": (
        "test_scored_continuations_leave_no_trace_in_the_ledger",
        "test_a_request_alone_writes_what_it_writes_among_others_with_other_policies",
    ),
    "20 layers are independent": ("test_layers_are_scored_alone", "test_layers_choose_by_their_own_scores"),
    "21 a 100% budget and mere watching change no bit": (
        "test_a_whole_budget_is_bit_identical_to_no_policy",
        "test_watching_without_evicting_changes_no_logit",
    ),
    "22 logits equal the masked dense model at every step": ("test_logits_equal_the_masked_dense_model_at_every_step",),
    "23 positions stay true": (
        "test_every_rotated_key_stands_where_its_position_says",
        "test_positions_keep_counting_past_the_budget",
        "test_recall_needs_positions_less_than_the_distance_task_does",
    ),
    "24 several tokens appended to a gapped cache see what they may": (
        "test_scoring_evicts_after_each_piece_and_scores_on_what_is_left",
    ),
    "25 compaction keeps exactly what was kept": (
        "test_no_source_is_a_target_and_no_more_move_than_are_evicted",
        "test_compaction_moves_exactly_the_named_rows",
    ),
    "26 quantised caches move their scales": (
        "No FP8 or INT8 cache here: fp32, fp16 and bf16 only, which "
        "test_a_bfloat16_cache_evicts_and_moves_rows_bit_by_bit covers."
    ),
    "27 sliding-window layers are handled": (
        "test_a_sliding_window_model_is_held_inside_its_window_where_nothing_slides",
    ),
    "28 freed blocks are free in the same step": (
        "test_tail_blocks_are_free_before_the_next_step",
        "test_freed_blocks_let_more_requests_run_at_once",
    ),
    "29 no double free in 100,000 random operations": (
        "test_a_hundred_thousand_random_operations_lose_no_block_and_read_no_poison",
    ),
    "30 every remainder of the last block": ("test_every_remainder_of_the_last_block_is_right",),
    "31 out of blocks: evict before preempting": (
        "Not done on purpose: a request's evictions follow from its own tokens, never from load, so that the same "
        "request writes the same text under any load. Out of blocks means preemption and an exact replay: "
        "test_a_preempted_request_writes_what_it_would_have_written."
    ),
    "32 side memory is counted": (
        "test_side_bytes_are_what_ledgers_and_rings_hold_and_go_with_their_request",
        "test_bytes_are_those_of_the_tensors",
    ),
    "33 no leak between sequences": (
        "test_evicting_one_request_leaves_the_others_blocks_and_logits_alone",
        "test_poison_in_free_blocks_is_never_read",
    ),
    "34 a request alone equals the request in any batch": (
        "test_a_request_alone_writes_what_it_writes_among_others_with_other_policies",
        "test_the_order_of_requests_changes_nobodys_tokens",
    ),
    "35 policies mix in a batch, none included": (
        "test_a_request_alone_writes_what_it_writes_among_others_with_other_policies",
    ),
    "36 preempted requests resume exactly (replayed; nothing is swapped out here)": (
        "test_a_preempted_request_writes_what_it_would_have_written",
    ),
    "37 cancelling frees everything once": ("test_cancelling_in_the_middle_frees_everything_once",),
    "38 interval counters belong to requests": ("test_requests_that_join_late_count_their_own_intervals",),
    "39 CUDA graphs": "Nothing is captured on a CPU; the GPU path is a later piece of work.",
    "40 tensor parallel": "The embedded engine runs on one device; heads decide alone, so a split changes no decision.",
    "41 shared prefix blocks are copied before they change": "No block is ever shared: the engine has no prefix cache.",
    "42 evicted content is never published under a prefix hash": "No prefix cache, so nothing is published.",
    "43 scores of reused prefix blocks": "No prefix cache, so nothing is reused.",
    "44 forks leave their parent alone": (
        "test_scored_continuations_do_not_see_each_other",
        "test_scored_continuations_leave_no_trace_in_the_ledger",
    ),
    "45 unsupported combinations are refused at configuration": (
        "test_what_cannot_be_carried_out_is_refused_at_open_and_per_request_alike",
        "test_budgets_that_cannot_be_are_refused_where_they_are_read",
    ),
    "46 H2O beats window and random on recall": (
        "test_h2o_beats_window_and_random_by_wide_margins_at_an_eighth_of_the_context",
        "test_random_is_worth_about_its_share_of_the_pairs",
    ),
    "47 age-corrected scorers are no worse than the sum": (
        "test_scorers_that_correct_for_age_lose_nothing_against_the_sum",
    ),
    "48 eviction really acted": (
        "test_h2o_beats_window_and_random_by_wide_margins_at_an_eighth_of_the_context",
        "test_in_the_engine_it_holds_the_budget_and_ends_every_request",
    ),
    "49 evicting rarely costs a bounded amount": ("test_evicting_every_32_steps_costs_at_most_five_points",),
    "50 two runs keep the same tokens": ("test_the_same_run_twice_evicts_and_writes_the_same",),
}


def test_all_fifty_are_answered():
    assert [name[:2] for name in BEHAVIOURS] == [f"{number:02}" for number in range(1, 51)]


def test_every_test_named_here_exists():
    written = set()
    for file in Path(__file__).parents[1].rglob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        written |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = {name for tests in BEHAVIOURS.values() if isinstance(tests, tuple) for name in tests}
    assert named <= written, f"renamed or gone: {sorted(named - written)}"
