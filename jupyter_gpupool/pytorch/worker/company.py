"""What a worker and the lease's workers on other servers do where one of them moves: nobody is in an exchange then.

The worker that follows takes the name of the one before, by which the others know it, and is linked to them before
anything is decided. Only then they use the new links in place of those before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .peer_links import MAX_NAME, PeerLinks
from .plain_form import checked, plain
from .spread_collectives import GroupState, SpreadMeetings


@dataclass(frozen=True)
class CompanyState:
    """A worker's name, the others to which it is linked, and the groups of ranks that it has with them."""

    name: str
    linked: tuple[str, ...]
    groups: tuple[GroupState, ...]


class Company:
    """The lease's workers on other servers, as one of them sees them."""

    def __init__(self, links: PeerLinks, meetings: SpreadMeetings) -> None:
        self._links = links
        self._meetings = meetings
        self._arrived = CompanyState("", (), ())

    # -- at the worker that is left

    def describe(self, sessions: Mapping[object, str]) -> Any:
        """All that the worker which follows has to know, in plain values. ``sessions``: the ids of the members."""
        links = self._links
        linked = tuple(name for name in links.known if links.find(name) is not None)
        return plain(CompanyState(links.name, linked, self._meetings.describe(links.name, sessions)))

    # -- at the worker that follows

    def arrive(self, given: Any) -> None:
        """Take over a name, and begin to be linked. Raises ValueError for what is no description."""
        state = checked(CompanyState, given)
        if not 0 < len(state.name) <= MAX_NAME or not all(map(self._links.is_name, state.linked)):
            raise ValueError("names that are none")
        self._arrived = state
        self._links.take_over(state.name, state.linked)

    def missing(self) -> int:
        """How many are not linked yet. Raises RuntimeError if one cannot be."""
        return len(self._links.missing(self._arrived.linked))

    def go_on(self, members: Mapping[str, object]) -> None:
        """Go on with the groups, whose members have these ids."""
        self._meetings.restore(self._arrived.groups, self._links.name, self._links.find, members)
        self._links.is_next = False

    # -- at the others

    def expect(self, name: Any) -> None:
        """The worker of that name is about to move. Raises ValueError."""
        self._links.expect(name)

    def replace(self, is_done: bool) -> None:
        """It has moved, or stays."""
        for before, now in self._links.replace(is_done):
            self._meetings.relink(before, now)
