"""Each rule of docs/design.md section 2 names tests that fail when it is broken; this holds the list to both."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent

RULES = {
    1: {
        "test_machine_vcpu": [
            "test_a_bus_lock_exit_is_one_lock",
            "test_reason_33_without_the_flag_is_no_lock",
            "test_the_flag_with_reason_0_is_one_lock",
            "test_the_flag_on_port_io_is_one_lock_and_the_access_is_answered",
            "test_flags_left_by_a_failed_run_are_not_counted",
        ],
        "test_bus_locks": ["test_a_split_lock_on_mmio_is_answered_and_counted_once"],
    },
    2: {
        "test_backend_kvm_vm": [
            "test_a_host_without_the_exit_bit_is_told_although_the_kernel_would_accept",
            "test_bus_lock_exits_are_refused_once_a_vcpu_exists",
            "test_there_is_no_way_back_to_off",
            "test_off_and_exit_together_are_refused_by_name",
            "test_unknown_bits_are_refused_by_value",
        ],
        "test_bus_locks": ["test_eight_vcpus_of_one_vm_are_counted_each"],
    },
    3: {
        "test_bus_locks_absent": [
            "test_require_refuses_before_any_guest_runs",
            "test_a_limit_on_what_cant_be_seen_is_refused_wherever_it_is_asked_for",
        ],
        "test_fleet": ["test_a_limit_on_what_is_not_seen_is_refused"],
    },
    4: {
        "test_bus_locks": [
            "test_rip_is_on_the_instruction_if_fault_like_and_behind_it_if_trap_like",
            "test_the_vendor_says_how_locks_are_reported",
        ],
        "test_fleet": ["test_the_way_they_are_reported_is_part_of_the_statistics"],
    },
    5: {
        "test_machine_instance": ["test_an_mmio_device_gets_offset_size_and_value"],
        "test_machine_vm": [
            "test_ports_are_answered_by_a_task_at_every_size",
            "test_mmio_is_answered_by_a_task_at_every_size",
        ],
        "test_fleet_channels": ["test_an_exit_says_who_when_where_and_what"],
    },
    6: {
        "test_fleet_channels": [
            "test_a_full_channel_drops_and_counts_while_everything_else_stays_exact",
            "test_a_full_ring_drops_and_counts_while_the_counters_stay_exact",
        ]
    },
    7: {
        "test_machine_vcpu": ["test_an_exit_that_nobody_handles_fails_it_with_the_reason"],
        "test_fleet": ["test_one_vm_failing_ends_that_vm_alone"],
    },
    8: {
        "test_machine_vm": [
            "test_pause_and_stop_end_a_long_wait_for_ones_turn_at_once",
            "test_pause_and_stop_end_a_long_wait_on_a_thread_at_once",
        ],
        "test_fleet": ["test_a_limit_changed_ends_a_wait_on_a_thread"],
    },
    9: {
        "test_fleet": [
            "test_in_no_window_are_there_more_than_burst_and_rate_allow",
            "test_the_slowest_of_stacked_limits_counts",
            "test_max_delay_bounds_a_wait_and_releases_are_counted",
        ],
        "test_bus_locks": ["test_a_budget_holds_in_every_window_and_the_wait_is_accounted"],
    },
    10: {
        "test_fleet": [
            "test_a_limit_holds_at_every_level_and_on_each_meter",
            "test_a_limit_set_and_changed_while_it_runs_takes_effect_at_once",
        ],
        "test_bus_locks": ["test_limits_change_at_all_four_levels_while_the_guest_waits"],
    },
    11: {"test_cancellation": ["test_a_fleet_cancelled_in_the_middle_leaves_nothing"]},
    12: {
        "test_cancellation": [
            "test_kicks_from_everywhere_lose_no_command",
            "test_a_vcpu_in_a_guest_loop_ends_within_100_ms",
        ],
        "test_soak": ["test_many_vms_that_are_paused_in_the_middle_of_a_storm_stop_together"],
    },
    13: {"test_machine_instance": ["test_more_vcpus_than_trio_has_threads_run_at_once_and_take_none_of_them"]},
    14: {"test_layers": ["test_no_module_keeps_counters_registries_or_locks"]},
    15: {
        "test_layers": ["test_words_know_of_no_trio_no_clock_and_no_io"],
        "test_fleet_runner": [
            "test_a_policy_that_fails_is_switched_off_and_journaled_and_the_others_go_on",
            "test_the_limits_that_a_broken_policy_set_last_stay_in_force",
            "test_strict_raises_instead",
        ],
    },
    16: {
        "test_fleet": [
            "test_actions_do_what_they_say_and_are_journaled_with_their_reason",
            "test_an_action_that_cant_be_done_is_journaled_with_the_error",
        ],
        "test_journal_causes": ["test_what_why_names_first_held_the_vm_for_longest_by_the_counters"],
    },
    17: {"test_policy_engine": ["test_live_replayed_and_simulated_rule_the_same"]},
    18: {
        "test_machine_devices_digest": [
            "test_a_descriptor_is_read_once_however_the_guest_changes_it_meanwhile",
            "test_a_descriptor_that_is_no_memory_breaks_it_until_it_is_reset",
        ],
        "test_machine_devices_peripheral": ["test_any_accesses_are_survived_and_what_is_read_fits_its_size"],
        "test_machine_devices_assembly": ["test_a_device_that_fails_at_a_ring_ends_its_vm_by_name_and_no_other"],
    },
    19: {
        "test_machine_devices_digest": ["test_a_guest_rings_without_an_exit_and_is_interrupted_without_python"],
        "test_machine_devices_assembly": ["test_a_timer_expires_on_the_fleets_clock"],
    },
}


def test_every_rule_of_the_design_has_tests():
    section = (ROOT / "docs" / "design.md").read_text().split("## 2. What must always hold")[1].split("\n## ")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)] == list(RULES)


@functools.cache
def functions_of(module: str) -> set[str]:
    tree = ast.parse((HERE / f"{module}.py").read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("rule", RULES)
def test_the_tests_of_a_rule_are_there(rule):
    missing = {
        f"{module}::{name}" for module, names in RULES[rule].items() for name in set(names) - functions_of(module)
    }
    assert not missing
