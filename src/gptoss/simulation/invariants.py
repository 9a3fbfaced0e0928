"""What must hold in every run, whatever the scenario; each is a function named for what it says."""

from gptoss.simulation.line_invariants import (
    nobody_jumps_the_queue,
    refusals_are_for_a_reason,
    sessions_end,
    sessions_in_use_are_kept,
    tenants_take_turns,
)
from gptoss.simulation.log_invariants import (
    decisions_replay,
    log_recovers,
    nobody_is_let_in_unrecorded,
    nothing_fails_unexpectedly,
    nothing_leaks_text,
    positions_are_gapless,
    projections_rebuild,
)
from gptoss.simulation.observed import Invariant
from gptoss.simulation.operator_invariants import (
    draining_executors_take_nobody,
    large_requests_go_to_several_devices,
    restarts_refuse_nobody,
    settings_reach_deciders,
)
from gptoss.simulation.request_invariants import (
    cancel_frees_memory,
    cancels_are_heeded,
    deadlines_fire,
    every_request_ends,
    text_is_delivered_whole,
    tokens_are_contiguous,
)
from gptoss.simulation.resource_invariants import (
    asks_resolve,
    grants_cover_requests,
    letters_balance,
    mailboxes_are_empty,
    nothing_is_held_at_rest,
)

AT_REST: tuple[Invariant, ...] = (
    mailboxes_are_empty,
    asks_resolve,
    decisions_replay,
    nothing_is_held_at_rest,
    every_request_ends,
    deadlines_fire,
    tokens_are_contiguous,
    text_is_delivered_whole,
    cancels_are_heeded,
    cancel_frees_memory,
    nobody_jumps_the_queue,
    tenants_take_turns,
    refusals_are_for_a_reason,
    sessions_in_use_are_kept,
    sessions_end,
    grants_cover_requests,
    restarts_refuse_nobody,
    draining_executors_take_nobody,
    large_requests_go_to_several_devices,
    settings_reach_deciders,
    projections_rebuild,
    nothing_fails_unexpectedly,
    nobody_is_let_in_unrecorded,
    log_recovers,
)
"""Once all requests have ended and nothing happens any more."""

AT_THE_END: tuple[Invariant, ...] = (letters_balance, positions_are_gapless, nothing_leaks_text)
"""After the system was stopped."""

AFTER_A_CRASH: tuple[Invariant, ...] = (log_recovers, positions_are_gapless, nothing_leaks_text)
"""When the process died in the middle."""
