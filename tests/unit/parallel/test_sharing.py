"""Activities that share resources: hand-computed cases, and that nothing exceeds a capacity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.parallel.sharing import Activity, Resource, SharedTime


def ends_of(*jobs):
    """When each (work, weights) ends if all start at once."""
    time, ends = SharedTime(), {}
    for number, (work, weights) in enumerate(jobs):
        time.start(Activity(work, weights, lambda number=number: ends.setdefault(number, time.now)))
    time.run()
    return [ends[number] for number in range(len(jobs))]


def test_work_without_resources_takes_its_time():
    assert ends_of((3.0, {}), (0.0, {}), (1.5, {})) == [3.0, 0.0, 1.5]


def test_equal_users_share_equally_until_one_is_done():
    port = Resource(10.0)
    # 5 each per second until the small one has its 10 at t = 2; the big one has 20 left, alone at 10.
    assert ends_of((10.0, {port: 1.0}), (30.0, {port: 1.0})) == pytest.approx([2.0, 4.0])


def test_the_clock_stops_at_the_last_end_though_rates_rose_before_it():
    time, port = SharedTime(), Resource(1.0)
    for work in (1.0, 2.0):
        time.start(Activity(work, {port: 1.0}, lambda: None))
    time.run()
    assert time.now == pytest.approx(3.0)  # at its first rate, the second would have taken until 4


def test_the_narrowest_resource_sets_the_pace():
    wide, narrow = Resource(100.0), Resource(10.0)
    # The first asks the wide port for 10 only, the second for all of it: 110 of 100, so each gets 10/11 of what it asks.
    first, second = ends_of((10.0, {wide: 1.0, narrow: 1.0}), (100.0, {wide: 1.0}))
    assert first == pytest.approx(1.1)
    assert second == pytest.approx(1.1)


def test_a_started_follower_waits_for_its_turn():
    time, port, ends = SharedTime(), Resource(2.0), []

    def follow():
        time.start(Activity(4.0, {port: 1.0}, lambda: ends.append(time.now)))

    time.start(Activity(2.0, {port: 1.0}, follow))
    time.run()
    assert ends == pytest.approx([3.0])


work = st.just(0.0) | st.floats(1e-9, 100)  # seconds or bytes: no time can be told for 5e-324 of them
jobs = st.lists(st.tuples(work, st.dictionaries(st.integers(0, 3), st.floats(0.1, 10), max_size=4)), min_size=1, max_size=8)


@given(st.lists(st.floats(0.5, 20), min_size=4, max_size=4), jobs)
def test_no_resource_gives_more_than_it_has_and_no_one_is_slower_alone(capacities, jobs):
    def together(some):
        resources = [Resource(capacity) for capacity in capacities]
        return ends_of(*((work, {resources[i]: weight for i, weight in weights.items()}) for work, weights in some))

    ends = together(jobs)
    for number, capacity in enumerate(capacities):
        assert sum(work * weights.get(number, 0.0) for work, weights in jobs) <= capacity * max(ends) * (1 + 1e-9)
    for job, end in zip(jobs, ends, strict=True):
        assert together([job])[0] <= end * (1 + 1e-9)
