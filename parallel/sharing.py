"""Activities that share resources in simulated time: computations, messages, and the ports, cards and cores they need.

The model is a fluid one. Alone, an activity runs as fast as its narrowest resource lets it. Together, each asks for that
speed; a resource that is asked for more than it has gives everyone the same fraction of what they ask, and an activity runs
at the smallest fraction it gets anywhere. So n messages through one port get 1/n of it each, nothing ever exceeds a capacity,
and an activity that ends never slows another down.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping

TOGETHER = 1e-12
"""Ends closer than this fraction of the time now count as simultaneous: they would be, but for rounding."""


class Resource:
    """Something of which there is a limited amount per second: bytes through a port, core-seconds of a host."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.users: dict[int, Activity] = {}
        self.fraction = 1.0

    def share(self) -> None:
        """Work out anew what everyone gets of what they ask for."""
        asked = sum(user.alone * user.weights[self] for user in self.users.values())
        self.fraction = self.capacity / asked if asked > self.capacity else 1.0


class Activity:
    """Some work that runs until it is done, then calls `done`.

    weights: amount of each resource that a unit of work takes. Without any, work is done at one unit per second.
    """

    def __init__(self, work: float, weights: Mapping[Resource, float], done: Callable[[], None]) -> None:
        self.left, self.done = work, done
        self.weights = {resource: weight for resource, weight in weights.items() if weight > 0}
        self.alone = min((resource.capacity / weight for resource, weight in self.weights.items()), default=1.0)
        self.rate = self.since = 0.0
        self.number = self.version = -1

    def run_to(self, now: float) -> None:
        """Account for what was done since the rate last changed."""
        self.left = max(0.0, self.left - self.rate * (now - self.since))
        self.since = now


class SharedTime:
    """The clock. Deterministic: equal starts give equal ends, to the last bit."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._ends: list[tuple[float, int, int, Activity]] = []
        self._new: list[Activity] = []
        self._changed: dict[Resource, None] = {}

    def start(self, activity: Activity) -> None:
        """Begin an activity now."""
        activity.number, activity.since = next(self._numbers), self.now
        for resource in activity.weights:
            resource.users[activity.number] = activity
            self._changed[resource] = None
        self._new.append(activity)

    def run(self) -> None:
        """Until nothing is left to do."""
        self._share()
        while (end := self._next()) is not None:
            self.now = max(self.now, end)
            while (end := self._next()) is not None and end <= self.now * (1 + TOGETHER):
                self._end(heapq.heappop(self._ends)[3])
            self._share()

    def _next(self) -> float | None:
        """When the next activity ends; ends foretold before a rate changed are forgotten."""
        while self._ends and self._ends[0][2] != self._ends[0][3].version:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def _end(self, activity: Activity) -> None:
        activity.version += 1
        for resource in activity.weights:
            del resource.users[activity.number]
            self._changed[resource] = None
        activity.done()

    def _share(self) -> None:
        """New rates for everyone whose resources have gained or lost a user, all changes of this instant together."""
        touched = {activity.number: activity for activity in self._new}
        for resource in self._changed:
            resource.share()
            touched.update(resource.users)
        self._new, self._changed = [], {}
        for activity in touched.values():
            rate = activity.alone * min((resource.fraction for resource in activity.weights), default=1.0)
            if rate != activity.rate:
                activity.run_to(self.now)
                activity.rate = rate
                activity.version += 1
                heapq.heappush(self._ends, (self.now + activity.left / rate, activity.number, activity.version, activity))
