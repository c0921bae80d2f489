"""The processes that fill a store together."""

import os
import platform
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from training_utils.data import parallel


@dataclass(frozen=True)
class Processes:
    """The processes that fill a store together, as one of them sees them.

    `rank` is this one's among `world_size`, `local_rank` among the `local_world_size` of this machine. `gather(items)`
    returns the lists of all of them, one after the other; a collective call. `on_cpu` is whether the networks run on
    the CPU.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    gather: Callable[[list], list]
    on_cpu: bool = False

    @property
    def threads(self) -> int:
        """How many threads of this process read images: Pillow releases the interpreter's lock meanwhile."""
        return max(1, min(8, (os.cpu_count() or 1) // self.local_world_size))

    def prepare_in_threads(
        self, function: Callable[[Any], Any], items: Sequence[Any], batch_size: int
    ) -> Iterator[Any]:
        """`function(item)` of each item, in order, for networks that take `batch_size` at once.

        Beside a GPU, items are prepared while the networks run on earlier ones. On a CPU they are prepared in between:
        the threads of a network wait for each other, and a core that prepares items keeps all of them waiting.
        """
        count = max(batch_size, 2 * self.threads)
        if self.on_cpu:
            return parallel.read_between(function, items, self.threads, count)
        return parallel.read_ahead(function, items, self.threads, count)


def find_processes(*, rank: int, gather: Callable[[list], list], on_cpu: bool) -> Processes:
    """The process `rank` and all others that call this. A collective call."""
    # Containers on two machines may have the same name.
    machine = f"{platform.node()} {uuid.getnode()}"
    machines = gather([machine])
    return Processes(
        rank=rank,
        world_size=len(machines),
        local_rank=machines[:rank].count(machine),
        local_world_size=machines.count(machine),
        gather=gather,
        on_cpu=on_cpu,
    )
