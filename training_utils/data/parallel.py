"""Reading several items at the same time, in threads."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor


def num_threads():
    return min(16, 4 * (os.cpu_count() or 1))  # they wait for the disk


def read_ahead(function, items, threads, ahead=None):
    """`function(item)` of each item, in order, `ahead` items ahead, a few where it is None: all of them at once might
    not fit into memory."""
    waiting, pool = deque(), ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > (ahead or 2 * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_between(function, items, threads, many):
    """`function(item)` of each item, in order: `many` at a time, and none while the caller is busy with those."""
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(items), many):
            yield from list(pool.map(function, items[at : at + many]))
