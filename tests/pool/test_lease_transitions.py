"""The table of a lease's transitions is consistent, and the page has its rows."""

from __future__ import annotations

from pathlib import Path

from jupyter_gpupool.core.models import LeaseState
from jupyter_gpupool.pool.lease_transitions import TRANSITIONS, find_transition
from jupyter_gpupool.pool.manager import Manager

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "life-of-a-lease.md"


def test_every_transition_is_there_once_and_by_calls_of_the_manager() -> None:
    assert len({(one.before, one.after) for one in TRANSITIONS}) == len(TRANSITIONS)
    for one in TRANSITIONS:
        assert one.calls
        assert all(callable(getattr(Manager, call, None)) for call in one.calls), one


def test_nothing_leaves_an_ended_state_and_every_live_state_can_end() -> None:
    assert not [one for one in TRANSITIONS if one.before is not None and one.before.ended]
    for state in {one.after for one in TRANSITIONS} - {state for state in LeaseState if state.ended}:
        assert [one for one in TRANSITIONS if one.before is state and one.after.ended], state


def test_a_transition_is_found_by_its_states() -> None:
    assert find_transition(None, LeaseState.QUEUED) is TRANSITIONS[0]
    assert find_transition(LeaseState.LOST, LeaseState.ACTIVE) is None


def test_the_page_has_the_rows_of_the_table() -> None:
    text = PAGE.read_text()
    rows = text.split("| from | to | cause |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    shown = [tuple(cell.strip().strip("`") for cell in row.strip("| ").split(" | ")) for row in rows]
    expected = [(one.before.value if one.before else "—", one.after.value, one.cause) for one in TRANSITIONS]
    assert shown == expected
