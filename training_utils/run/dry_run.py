"""TODO"""

import itertools

import numpy as np

from training_utils.base.console import is_main_process

STEPS = 3  # that are made; the first one also compiles, allocates and warms up, and is not counted


def ahead(batches, count):
    """The same batches, the first `count` of which are made now: what makes them is then no part of a step."""
    return itertools.chain([next(batches) for _ in range(count)], batches)


def report(rows, val_dataset, updates, total, progress, networks, device, memory, peak):
    """Print it all, once, whatever the number of processes.

    Args: the data.Rows to train on and those held out, or None; `updates`, data.BatchPlan, and the `total` number of
    them in the run; `progress`, reporting.Progress over those that were made; `networks`, {name: {module: (parameters
    that are trained, that are not)}}; `device`, its name; `memory`, {what takes it: bytes}, of one process, and the
    `peak` that was measured there, in bytes.
    """
    if not is_main_process():
        return
    blocks = [
        _data(rows, val_dataset, updates, total, progress.first),
        *(_parameters(name, modules) for name, modules in networks.items()),
        _memory(device, memory, peak),
        _time(list(progress.seconds), total - progress.first),
    ]
    print("\n\n".join("\n".join(lines) for lines in blocks), flush=True)


def _data(rows, val_dataset, updates, total, done):
    lines = [f"images      {len(rows):,} to train on, {len(val_dataset or []):,} held out"]
    if rows.stream is not None:
        lines.append(f"chunks      {rows.source.describe_chunks()}")
    if rows.sizes is not None:
        sizes, counts = np.unique(rows.sizes, axis=0, return_counts=True)
        lines += [f"  {f'{width} x {height}':<12}{count:>14,}" for (width, height), count in zip(sizes, counts)]
    each = f"{updates.samples_per_step:,} images"
    if updates.mean_samples_per_step < updates.samples_per_step:
        each = f"up to {each}, {updates.mean_samples_per_step:.3g} on average"
    lines.append(f"steps       {total:,} of {each}" + (f"; {done:,} of them are made" if done else ""))
    lines.append(f"epochs      {total / updates.steps_per_epoch:,.1f}, of {updates.steps_per_epoch:,} steps each")
    return lines


def _parameters(name, modules):
    width = max(map(len, [*modules, "in all"]))
    lines = [f"{f'parameters of {name}':<{width + 2}}{'trained':>16}{'frozen':>16}"]
    sums = tuple(map(sum, zip(*modules.values())))
    first = len(lines[0]) - 32
    for module, (trained, frozen) in [*modules.items(), ("in all", sums)]:
        lines.append(f"  {module:<{first - 2}}{trained:>16,}{frozen:>16,}")
    return lines


def _memory(device, memory, peak):
    rest = {"activations and all the rest": peak - sum(memory.values()), "peak, as measured": peak}
    lines = [f"memory of {device} for one process"]
    return lines + [f"  {what:<30}{size / 2**20:>14,.1f} MiB" for what, size in (memory | rest).items()]


def _time(seconds, left):
    if not seconds:
        return ["time        no step is left to be made"]
    pace = float(np.mean(seconds[1:] or seconds))
    counted = f"{len(seconds[1:])} timed, after the first one" if seconds[1:] else "the first and only one"
    return [
        f"time        {pace:.3g} s a step ({counted})",
        f"            {_duration(pace * left)} for {left:,} steps, without caches, checkpoints and validation",
    ]


def _duration(seconds):
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 60) // 60
    return f"{hours:,} h {minutes % 60} min" if hours else f"{minutes} min"
