"""What every rank posts about itself, so that the others can tell which one they wait for.

A post is a small file `log/rank<k>.post`, overwritten every few seconds by a thread: it goes on while the rank's main thread
is blocked, and stops when the process is stopped, or dead, or its machine is gone. No collective is needed, no clock compared.
"""

from __future__ import annotations

import dataclasses
import json
import linecache
import os
import sys
from pathlib import Path

SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Post:
    """number: counts a rank's posts. idle_s: seconds without progress. expired: these are too many.

    waits: whether the main thread waits for other ranks; None if that cannot be seen (inside torch).
    """

    rank: int
    pid: int
    host: str
    number: int
    phase: str
    step: int | None
    idle_s: float
    place: str
    waits: bool | None
    expired: bool

    @property
    def name(self) -> str:
        """`rank 3 (pid 4711 on node2)`."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        """`step 12: forward and backward, in all_reduce (train.py:160)`."""
        return (f"step {self.step}: " if self.step is not None else "") + f"{self.phase}, in {self.place}"

    def write(self, folder: Path) -> None:
        """Replace this rank's post."""
        text = json.dumps(dataclasses.asdict(self))[:SIZE].ljust(SIZE)
        fd = os.open(folder / f"rank{self.rank}.post", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(fd, text.encode()[:SIZE], 0)
        finally:
            os.close(fd)


def read_posts(folder: Path, ranks: int) -> dict[int, Post]:
    """The posts of ranks 0 .. ranks-1, without those that are not there or just being written."""
    posts = {}
    for rank in range(ranks):
        try:
            posts[rank] = Post(**json.loads((folder / f"rank{rank}.post").read_text()))
        except (OSError, ValueError, TypeError):
            continue
    return posts


def place_of(thread: int) -> tuple[str, bool | None]:
    """Where a thread of this process is: `all_reduce (train.py:160 in _agree)`, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) == os.path.dirname(__file__):
        frame = frame.f_back  # the watchdog itself, or what only calls what blocks
    waits: bool | None = False
    called = ""
    innermost = True
    while frame is not None:
        file, name, line = frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
        if file.endswith(os.path.join("torch", "distributed", "distributed_c10d.py")):
            waits, called = True, name
        elif f"{os.sep}torch{os.sep}" in file:
            waits = None if waits is False and innermost else waits
            called = name if innermost or "backward" in name else called
        else:
            if innermost and (".wait(" in linecache.getline(file, line)):
                waits = True
            here = f"{os.path.basename(file)}:{line} in {name}"
            return (f"{called} ({here})" if called else here), waits
        innermost = False
        frame = frame.f_back
    return called or "a place without Python", None


def diagnose(before: dict[int, Post], after: dict[int, Post], ranks: int) -> str:
    """Who keeps the others waiting, and where, from the posts of two moments between which every rank should have posted."""
    silent = [post for rank, post in before.items() if rank in after and after[rank].number == post.number]
    if missing := [rank for rank in range(ranks) if rank not in after]:
        return f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} never began"
    if silent:
        text = "; ".join(
            f"{post.name} does not answer: it is stopped, or its machine is; it was in {post.where}" for post in silent
        )
    else:
        posts = list(after.values())
        behind = min((post.step or 0) for post in posts)
        late = [post for post in posts if (post.step or 0) == behind]
        culprits = [post for post in late if post.waits is False] or [post for post in late if post.waits is None] or late
        if len(culprits) == len(posts) > 1 and len({post.where for post in posts}) == 1:
            return f"all ranks are blocked in {posts[0].where}"
        text = "; ".join(f"{post.name} is blocked in {post.where}" for post in culprits)
        silent = culprits
    waiting = [post for post in after.values() if post.rank not in {other.rank for other in silent}]
    if waiting:
        who = f"rank{'s' if len(waiting) > 1 else ''} " + ", ".join(str(post.rank) for post in waiting[:8])
        more = f" and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        text += f"; {who}{more} wait{'s' if len(waiting) == 1 else ''} in {waiting[0].where}"
    return text
