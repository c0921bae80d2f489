#!/usr/bin/env python
"""Measure the training scripts: images a second, peak memory, and how much of the time is not the trained network's.

    python benchmarks/throughput.py                     mid-size models on the CPU, or real-size ones on a GPU
    python benchmarks/throughput.py --family sd --check  exit code 1, and what is missed, unless the goals are met
    python benchmarks/throughput.py --family sd --only cached --batch 32 --repeats 1   one run, where time is short

Every run is a process that calls a script's real `main` with a real command line, on models with random weights and
images that are made here. Runs of a family take turns, a few steps each, so that whatever else the machine does
meets all of them; what is reported are medians over the turns, and of ratios the median ratio within a turn. "outside"
is the share of a step's time beyond forward, backward and step of the same network, in the same process and turn, on
tensors that are ready. On a CPU, peak memory is that of the whole process once everything is loaded, the whole of each
frozen network included and what is mapped of the cache left out, in further runs of two steps whose allocator gives
back at once what is free.
"""

import argparse
import json
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_goals import GOALS, judge
from bench_runs import FAMILIES, TITLES, Bench, cores, runs_of, seconds_to_read
from bench_tables import summary, table, verdict

# Dense bfloat16 on tensor cores with float32 sums, in TFLOP/s, from the makers' data sheets.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "A10": 125, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}


def device_name(device):
    if device == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            name = platform.machine()
        return f"{name}, {cores()} cores"
    import torch

    return torch.cuda.get_device_name()


def measure_family(folder, family, size, device, repeats, steps, compiled, only=None, batch=None):
    """All that is reported of a family, a dict: of all runs or those of the names in `only`, which builds no cache by
    itself; `batch` takes the place of each run's own."""
    import models

    cost, real = models.count(family, size), models.count(family, "real")
    bench = Bench(folder, family, size, device, repeats, steps)
    runs = [run for run in runs_of(family, device, compiled) if only is None or run.name in only]
    for run in runs:
        run.batch = batch or run.batch
    built = bench.measure(runs, build=only is None)
    peak_flops = None
    if device == "cuda":
        name = device_name(device)
        peak_flops = next((1e12 * peak for card, peak in PEAKS.items() if card in name), None)
    found = {}
    for run in (run for run in runs if not run.failed):
        plain = next((other for other in runs if other.kind == run.kind and not other.cached), None)
        flop = cost["lora" if run.lora else "training"]
        found[run.name] = summary(run, plain, flop, cost["frozen"], peak_flops)
    return {
        "runs": found,
        **({"building": built} if built else {}),
        "frozen bytes": cost["frozen parameters"] * (4 if device == "cpu" else 2),
        "proportion": cost["frozen"] / cost["training"],
        "real proportion": real["frozen"] / real["training"],
        "flop": cost,
    }


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES, help="what to measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out, the GPU where there is one")
    parser.add_argument("--size", choices=("tiny", "mid", "real"), help="left out, mid on a CPU, real on a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each run")
    parser.add_argument("--steps", type=int, help="steps in a turn; left out, 1 on a CPU, 20 on a GPU")
    parser.add_argument(
        "--compiled", action="store_true", help="compiled runs on the CPU too, which take minutes more"
    )
    parser.add_argument("--only", nargs="+", metavar="RUN", help="runs by their names, such as 'LoRA cached'")
    parser.add_argument("--batch", type=int, help="images in a step of each run")
    parser.add_argument("--check", action="store_true", help="exit code 1 unless all goals are met")
    parser.add_argument("--json", type=Path, default=Path("throughput.json"), help="file for all that was measured")
    args = parser.parse_args(argv)
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_cpu = args.device == "cpu"
    args.size = args.size or ("mid" if on_cpu else "real")
    args.steps = args.steps or (1 if on_cpu else 20)
    known = {run.name for family in args.family for run in runs_of(family, args.device, args.compiled)}
    unknown = set(args.only or []) - known
    if unknown:
        parser.error(f"no run is called {min(unknown)!r}; there are {', '.join(sorted(known))}")
    return args


def measure(args):
    """All that is reported, a dict that JSON can hold."""
    results = {"device": args.device, "name": device_name(args.device), "size": args.size}
    results["read ms"] = 1000 * seconds_to_read()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for family in args.family:
            print(f"measuring {TITLES[family]} …", file=sys.stderr, flush=True)
            place = Path(folder) / family
            options = (args.size, args.device, args.repeats, args.steps, args.compiled, args.only, args.batch)
            results[family] = measure_family(place, family, *options)
            shutil.rmtree(place)  # real models are gigabytes
    return results


def conclude(results, goals, check, path):
    """Print what was measured and which goals it meets, and write it as JSON. Returns the exit code."""
    judged = judge(goals, results)
    print(f"{results['size']} models on {results['name']}\n\n{table(results)}\n\n{verdict(judged)}")
    facts = [goal._asdict() | {"measured": value, "met": met} for goal, value, met in judged]
    for fact in facts:
        del fact["measure"]
    path.write_text(json.dumps(results | {"goals": facts}, indent=1) + "\n")
    missed = [goal.name for goal, _, met in judged if not met]
    if missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
    return int(check and bool(missed))


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the contexts that end the processes
    return conclude(measure(args), GOALS, args.check, args.json)


if __name__ == "__main__":
    sys.exit(main())
