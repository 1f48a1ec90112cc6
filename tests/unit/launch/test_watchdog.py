"""Who is blamed for a standstill, and what counts as progress."""

import contextlib
import os
import threading
import time

import pytest
import torch

from lctrain.launch.posts import Post, diagnose, place_of, read_posts
from lctrain.launch.watchdog import HANG_STATUS, Watchdog
from lctrain.run_dir import RunDir


def post(rank: int, number: int, step: int = 5, waits: bool | None = True, place: str = "all_reduce (a.py:1 in f)") -> Post:
    return Post(rank, 100 + rank, "node", number, "step", step, 9.0, place, waits, False)


def blamed(before: list[Post], after: list[Post], ranks: int) -> str:
    return diagnose({one.rank: one for one in before}, {one.rank: one for one in after}, ranks)


def test_the_one_that_does_not_post():
    text = blamed([post(0, 1), post(1, 1), post(2, 1)], [post(0, 3), post(1, 1), post(2, 3)], 3)
    assert text.startswith("rank 1 (pid 101 on node) does not answer: it is stopped, or its machine is; it was in step 5: ")
    assert text.endswith("; ranks 0, 2 wait in step 5: step, in all_reduce (a.py:1 in f)")


def test_the_one_that_does_not_wait():
    asleep = post(1, 3, waits=False, place="read (b.py:2 in g)")
    text = blamed([post(0, 1), post(1, 1)], [post(0, 3), asleep], 2)
    assert text == (
        "rank 1 (pid 101 on node) is blocked in step 5: step, in read (b.py:2 in g); rank 0 waits in step 5: step, in"
        " all_reduce (a.py:1 in f)"
    )


def test_the_one_that_is_behind_even_if_it_waits():
    text = blamed([post(0, 1), post(1, 1)], [post(0, 3), post(1, 3, step=4)], 2)
    assert text.startswith("rank 1 (pid 101 on node) is blocked")


def test_inside_torch_before_waiting_and_all_alike_and_missing():
    inside = post(0, 3, waits=None, place="backward (c.py:3 in h)")
    assert blamed([post(0, 1), post(1, 1)], [inside, post(1, 3)], 2).startswith("rank 0 (pid 100 on node) is blocked")
    assert blamed([post(0, 1), post(1, 1)], [post(0, 3), post(1, 3)], 2) == (
        "all ranks are blocked in step 5: step, in all_reduce (a.py:1 in f)"
    )
    assert blamed([post(0, 1)], [post(0, 3)], 3) == "ranks 1, 2 never began"


def test_posts_survive_the_disk(tmp_path):
    post(1, 7).write(tmp_path)
    (tmp_path / "rank0.post").write_text('{"rank": 0, "pi')
    assert read_posts(tmp_path, 3) == {1: post(1, 7)}


def test_places():
    held = threading.Event()
    go = threading.Event()

    def wait_here() -> None:
        held.set()
        go.wait(60)

    thread = threading.Thread(target=wait_here)
    thread.start()
    held.wait()
    assert thread.ident is not None
    time.sleep(0.1)
    place, waits = place_of(thread.ident)
    go.set()
    thread.join()
    assert "in wait" in place
    assert waits is False


def ends_with(action, limit_s: float, run: RunDir | None = None) -> tuple[int, float]:
    """Status and seconds of a child that does `action` under a watchdog."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), Watchdog(0, 1, limit_s, speak=False) as watchdog:
            if run is not None:
                watchdog.post_to(run)
            watchdog.watch_layers()
            action(watchdog)
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - began


def compute(watchdog: Watchdog) -> None:
    layer = torch.nn.Identity()
    for _ in range(30):
        time.sleep(0.1)
        layer(torch.ones(1))


def phases(watchdog: Watchdog) -> None:
    for step in range(30):
        time.sleep(0.1)
        watchdog.phase("step", step)


def sleep(watchdog: Watchdog) -> None:
    watchdog.phase("step", 3)
    time.sleep(60)


@pytest.mark.parametrize("action", [compute, phases])
def test_progress_is_no_standstill(action):
    assert ends_with(action, 1.5)[0] == 0


def test_standstill_is_told_and_ended(tmp_path):
    run = RunDir(tmp_path / "run")
    status, seconds = ends_with(sleep, 1.0, run)
    assert status == HANG_STATUS
    assert seconds < 20
    (line,) = run.events.read_text().splitlines()
    assert "rank 0 (pid " not in line or "is blocked in step 3: step" in line
    assert "in sleep" in line
    assert "in sleep" in run.rank_log(0).read_text()


def test_no_limit_no_watch(tmp_path):
    with Watchdog(0, 1, 0, speak=False) as watchdog:
        watchdog.watch_layers()
        watchdog.phase("step", 1)
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
