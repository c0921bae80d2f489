"""Reading several items at the same time, in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_threads() -> int:
    """How many threads read small pieces of files: more than there are cores, since they wait for the disk."""
    return min(16, 4 * (os.cpu_count() or 1))


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int | None = None
) -> Iterator[Result]:
    """`function(item)` of each item, in order, `ahead` items ahead, a few where it is None: all of them at once might
    not fit into memory."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > (ahead or 2 * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_between(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, many: int
) -> Iterator[Result]:
    """`function(item)` of each item, in order: `many` at a time, and none while the caller is busy with those."""
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(items), many):
            yield from list(pool.map(function, items[at : at + many]))
