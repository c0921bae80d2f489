#!/usr/bin/env python
"""Measure the training scripts: images a second, peak memory, and how much of the time is not the trained network's.

    python benchmarks/throughput.py                     mid-size models on the CPU, or real-size ones on a GPU
    python benchmarks/throughput.py --family sd --check  exit code 1, and what is missed, unless the goals are met
    python benchmarks/throughput.py --family sd --only cached --batch 32 --repeats 1   one run, where time is short

Every run is a process that calls a script's real `main` with a real command line, on models with random weights and
images that are made here. Runs of a family take turns, a few updates each, so that whatever else the machine does
meets all of them; what is reported are medians over the turns, and of ratios the median ratio within a turn. "outside"
is the share of a step's time beyond forward, backward and step of the same network, in the same process and turn, on
tensors that are ready. On a CPU, peak memory is that of the whole process once everything is loaded, the whole of each
frozen network included and what is mapped of the cache left out, in further runs of two steps whose allocator gives
back at once what is free.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

FAMILIES = ("sd", "sdxl", "decoder", "prior", "flax")
TITLES = {
    "sd": "Stable Diffusion",
    "sdxl": "SDXL",
    "decoder": "Kandinsky decoder",
    "prior": "Kandinsky prior",
    "flax": "Stable Diffusion, JAX",
}
SCRIPTS = {
    ("sd", False): "train_text_to_image",
    ("sd", True): "train_text_to_image_lora",
    ("sdxl", False): "train_text_to_image_sdxl",
    ("sdxl", True): "train_text_to_image_lora_sdxl",
    ("decoder", False): "train_text_to_image_decoder",
    ("decoder", True): "train_text_to_image_lora_decoder",
    ("prior", False): "train_text_to_image_prior",
    ("prior", True): "train_text_to_image_lora_prior",
    ("flax", False): "train_text_to_image_flax",
}
CACHES = {family: ["--cache_latents", "--cache_text_embeddings"] for family in FAMILIES} | {
    "decoder": ["--cache_latents"]  # whose script reads no captions
}
# Has glibc give memory back at once, which is slower; else what is free but kept counts as memory of the process.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# What accelerate's --dynamo_backend says, and how a run with it is called here.
BACKENDS = {"no": "", "cudagraphs": ", graphs", "inductor": ", compiled"}
# By benchmarks/memory.py what fits an SDXL into the least.
LEAST_MEMORY = "--gradient_checkpointing --full_bf16 --optimizer adamw8bit --fused_backward_pass --max_grad_norm 0"
# Dense bfloat16 on tensor cores with float32 sums, in TFLOP/s, from the makers' data sheets.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "A10": 125, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}


# ---------------------------------------------------------------------------------------------------------------------
# What is run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One way to run a script, and what was measured: seconds a step, one for each turn, and bytes.

    Runs of one `kind` differ by their caches and by what torch.compile makes of the network alone.
    """

    family: str
    kind: str
    batch: int
    flags: list
    cached: bool = False
    backend: str = "no"  # what accelerate calls it
    step: list = field(default_factory=list)
    bare: list = field(default_factory=list)
    peak: int = 0
    failed: bool = False

    @property
    def name(self):
        how = "cached" if self.cached else "plain"
        return f"{self.kind} {how}{BACKENDS[self.backend]}".strip()

    @property
    def lora(self):
        return self.kind == "LoRA"

    @property
    def script(self):
        return SCRIPTS[self.family, self.lora]


def runs_of(family, device, compiled):
    """The runs of a family, in the order in which they take turns."""
    if device == "cpu":
        kinds = {"": (8, []), "LoRA": (8, [])}
        backends = ["inductor"] if compiled else []
    else:
        trained = {"sd": (32, []), "sdxl": (1, ["--gradient_checkpointing"])}
        kinds = {"": trained.get(family, (8, [])), "LoRA": (1, []), "least memory": (1, LEAST_MEMORY.split())}
        backends = ["cudagraphs", "inductor"]
    if family == "flax":  # JAX always compiles
        kinds, backends = {"": kinds[""]}, []
    made = []
    for kind, (batch, flags) in kinds.items():
        made.append(Run(family, kind, batch, flags))
        cached = flags + CACHES[family]
        made.append(Run(family, kind, batch, cached, cached=True))
        if kind != "least memory":  # in one graph gradients come all at once, which takes more
            made += [Run(family, kind, batch, cached, cached=True, backend=backend) for backend in backends]
    return made


class Child:
    """A process of run_script.py; its answers are dicts. Raises RuntimeError where it fails."""

    def __init__(self, kind, run, argv, folder, environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmarks" / "run_script.py"), kind, run.script, *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | environment,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def ask(self, *words):
        """Send a line and return the answer to it."""
        self.tell(*words)
        return self.answer()

    def tell(self, *words):
        try:
            print(*words, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self.failure() from None

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise self.failure()
        return json.loads(line)

    def failure(self):
        words = " ".join(self.process.args[2:])
        return RuntimeError(f"{words} ended before it was asked to:\n{self.log.read_text()[-3000:]}")


class Bench:
    """The models and images of one family in a folder, and the runs over them."""

    def __init__(self, folder, family, size, device, repeats, updates):
        import models

        self.folder, self.family, self.device, self.repeats, self.updates = folder, family, device, repeats, updates
        self.shape = models.SHAPES[family][size]
        self.threads = cores()
        self.models = models.write(folder / "model", family, size)
        self.images = {"tiny": 8, "mid": 48, "real": 128}[size]
        models.write_images(folder / "images", self.shape["resolution"], self.images)

    def child(self, kind, run, environment=None):
        out = self.folder / f"{kind} {run.name}".replace(" ", "-")
        words = f"--train_batch_size {run.batch} --max_train_steps 1000000 --learning_rate 1e-5 --seed 1"
        words += f" --resolution {self.shape['resolution']} --report_to none --checkpointing_steps 0"
        words += f" --mixed_precision {'no' if self.device == 'cpu' else 'bf16'}"
        argv = [*self.models, "--train_data_dir", str(self.folder / "images"), "--output_dir", str(out)]
        argv += words.split() + run.flags
        if self.family in ("sd", "sdxl", "flax"):
            argv += ["--center_crop"]
        if run.cached:
            argv += ["--encoding_cache_dir", str(self.folder / "cache")]
        if self.device != "cpu":
            argv += ["--dataloader_num_workers", str(min(8, self.threads))]
        settings = {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        settings["ACCELERATE_DYNAMO_BACKEND"] = run.backend
        return Child(kind, run, argv, out, settings | (environment or {}))

    def take_turns(self, runs, repeats, environment=None):
        """Start these runs at once, and let each make its steps in turn."""
        with ExitStack() as stack:
            pairs = [(run, stack.enter_context(self.child("updates", run, environment))) for run in runs]
            _each(pairs, lambda run, child: child.answer())  # warmed up
            for _ in range(repeats):
                _each(pairs, self.turn)
            _each(pairs, lambda run, child: setattr(run, "peak", max(run.peak, child.ask("end")["peak"])))

    def turn(self, run, child):
        run.step.append(child.ask("script", self.updates)["seconds"] / self.updates)
        if self.family != "flax":
            run.bare.append(child.ask("bare", self.updates)["seconds"] / self.updates)

    def measure(self, runs, build=True):
        """Fill in what is measured of these runs, and return what building their cache took."""
        cached = [run for run in runs if run.cached]
        built = self.build(cached[0]) if cached and build else None
        for kind in dict.fromkeys(run.kind for run in runs):
            some = [run for run in runs if run.kind == kind]
            if self.device == "cpu":
                self.take_turns(some, self.repeats)
                for run in some:
                    run.peak = 0
                self.take_turns(some, 0, EXACT_MEMORY)
            else:  # whose memory may hold but one
                for _ in range(self.repeats):
                    for run in some:
                        self.take_turns([run], 1)
        return built

    def build(self, run):
        """Build the cache of a run as often as there are turns, and the bare encoders' time for the same work."""
        if self.family == "flax":  # whose encoders are compiled functions, which nothing can stand behind
            first = replace(run)
            self.take_turns([first], 0)
            return {"peak": first.peak}
        found, build, bare = {}, np.zeros(self.repeats), np.zeros(self.repeats)
        with self.child("building", run) as child:
            while "what" in (answer := child.answer()):
                child.ask("build")  # the first one also waits for a GPU's libraries
                for turn in range(self.repeats):
                    answer = child.ask("build")
                    build[turn] += answer["build"]
                    bare[turn] += answer["bare"]
                child.tell("next")
            found["peak"] = child.ask("end")["peak"]
        return found | {"images": self.images, "build": build.tolist(), "bare": bare.tolist()}


def _each(pairs, work):
    """`work(run, child)` for each pair; a run that fails, out of memory for one, is left out from then on."""
    for run, child in pairs:
        if not run.failed:
            try:
                work(run, child)
            except RuntimeError as error:
                run.failed = True
                print(f"{TITLES[run.family]}, {run.name}: {error}", file=sys.stderr)


def seconds_to_read(repeats=200):
    """The seconds that reading the cached moments of an image of 1024 pixels takes, 4 x 128 x 128 in float32 each."""
    from training_utils.cache.store import Store

    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, "images", "benchmark")
        store.folder.mkdir(parents=True)
        keys = [f"image {number}" for number in range(64)]
        moments = {name: draw.standard_normal((64, 4, 128, 128), dtype=np.float32) for name in ("mean", "std")}
        store.write(keys, {name: ("float32", array) for name, array in moments.items()})
        store.refresh()
        return median(_seconds(lambda: store.read(keys[draw.integers(64)])) for _ in range(repeats))


def _seconds(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# What is wanted
# ---------------------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """`measure(results)` is to be at least or at most a number. It raises KeyError where it has not been measured."""

    name: str
    family: str | None
    device: str | None
    sign: str
    wanted: float
    measure: object

    def met(self, value):
        return value >= self.wanted if self.sign == ">=" else value <= self.wanted


def faster(family, name, than):
    """How many times as many images a second a run makes as another one: the median over the turns."""

    def measure(results):
        one, other = results[family]["runs"][name], results[family]["runs"][than]
        per_image = [(a / one["batch"], b / other["batch"]) for a, b in zip(one["step"], other["step"])]
        return median(b / a for a, b in per_image)

    return measure


def over_bare(family, name):
    """The steady step over the bare one."""
    return lambda results: median(
        step / bare for step, bare in zip(*(results[family]["runs"][name][key] for key in ("step", "bare")))
    )


def building(family):
    """The throughput of building the cache over that of the bare encoders."""

    def measure(results):
        found = results[family]["building"]
        return median(bare / build for build, bare in zip(found["build"], found["bare"]))

    return measure


def memory_saved(family, prefix=""):
    """By how many times the frozen networks' size a cached run's peak memory is below a plain one's."""

    def measure(results):
        runs = results[family]["runs"]
        saved = runs[f"{prefix}plain"]["peak"] - runs[f"{prefix}cached"]["peak"]
        return saved / results[family]["frozen bytes"]

    return measure


def peak_memory(family, name):
    return lambda results: results[family]["runs"][name]["peak"] / 1e9


def utilisation(family, name):
    return lambda results: results[family]["runs"][name]["mfu"] or 0.0  # unknown for a card that PEAKS lacks


KINDS = [(family, prefix) for family in ("sd", "sdxl", "decoder", "prior") for prefix in ("", "LoRA ")]
GOALS = [
    Goal("SD cached over plain", "sd", "cpu", ">=", 1.40, faster("sd", "cached", "plain")),
    Goal("SD LoRA cached over plain", "sd", "cpu", ">=", 1.55, faster("sd", "LoRA cached", "LoRA plain")),
    Goal("Kandinsky decoder cached over plain", "decoder", "cpu", ">=", 1.5, faster("decoder", "cached", "plain")),
    Goal("Kandinsky prior cached over plain", "prior", "cpu", ">=", 2.5, faster("prior", "cached", "plain")),
    *(
        Goal(f"{TITLES[family]}: {prefix}cached step over the bare one", family, None, "<=", 1.05, over_bare(*of))
        for family, prefix in KINDS
        for of in [(family, f"{prefix}cached")]
    ),
    *(
        Goal(f"{TITLES[family]}: building over the bare encoders", family, None, ">=", 0.95, building(family))
        for family in ("sd", "sdxl", "decoder", "prior")
    ),
    *(
        Goal(f"{TITLES[family]}: {prefix}memory saved, in frozen networks", family, None, ">=", 1.0, memory_saved(*of))
        for family, prefix in KINDS
        for of in [(family, prefix)]
    ),
    Goal("ms to read a cached sample of 1024 pixels", None, None, "<=", 2.0, lambda results: results["read ms"]),
    Goal("SD MFU", "sd", "cuda", ">=", 0.40, utilisation("sd", "cached, compiled")),
    Goal("SD LoRA cached over plain", "sd", "cuda", ">=", 2.0, faster("sd", "LoRA cached, graphs", "LoRA plain")),
    Goal("GB for SD", "sd", "cuda", "<=", 12.0, peak_memory("sd", "least memory cached")),
    Goal("GB for SDXL", "sdxl", "cuda", "<=", 24.0, peak_memory("sdxl", "least memory cached")),
]


def judge(goals, results):
    """[(goal, value or None where it was not measured, whether it is met)] of the goals for what was run."""
    judged = []
    for goal in goals:
        if goal.device not in (None, results["device"]) or (goal.family is not None and goal.family not in results):
            continue
        try:
            value = goal.measure(results)
        except KeyError:
            value = None
        judged.append((goal, value, value is not None and goal.met(value)))
    return judged


# ---------------------------------------------------------------------------------------------------------------------
# What is reported
# ---------------------------------------------------------------------------------------------------------------------


def summary(run, plain, flop, frozen_flop, peak_flops):
    """What is reported of a Run, as JSON holds it; `plain` is the run it is compared with, or None."""
    work = flop + (0 if run.cached else frozen_flop)
    speed = run.batch / median(run.step)
    return {
        "script": f"{run.script}.py",
        "batch": run.batch,
        "images per second": speed,
        "over plain": None if plain is None or plain.failed else median(b / a for a, b in zip(run.step, plain.step)),
        "step": run.step,
        "bare": run.bare,
        "outside": median(1 - bare / step for step, bare in zip(run.step, run.bare)) if run.bare else None,
        "peak": run.peak,
        "mfu": speed * work / peak_flops if peak_flops else None,
    }


def table(results):
    """The results as Markdown."""
    lines = [
        "| | run | batch | images/s | over plain | seconds a step | outside the network | over the bare step "
        "| peak memory, GB | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in (family for family in FAMILIES if family in results):
        for name, run in results[family]["runs"].items():
            bare = over_bare(family, name)(results) if run["bare"] else None
            cells = [
                *(TITLES[family], name, run["batch"], f"{run['images per second']:.3g}"),
                *("–" if run["over plain"] is None else f"{run['over plain']:.2f}", f"{median(run['step']):.3g}"),
                *("–" if run["outside"] is None else f"{run['outside']:.1%}", "–" if bare is None else f"{bare:.3f}"),
                *(f"{run['peak'] / 1e9:.2f}", "–" if run["mfu"] is None else f"{run['mfu']:.1%}"),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| | frozen over trained arithmetic, here | in the released model | building, images/s | over the bare "
        "encoders | peak memory while building, GB | frozen networks, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in (family for family in FAMILIES if family in results):
        found = results[family]
        cells = [TITLES[family], f"{found['proportion']:.3f}", f"{found['real proportion']:.3f}"]
        built = found.get("building", {})
        if "build" in built:
            speed = built["images"] / median(built["build"])
            cells += [f"{speed:.3g}", f"{building(family)(results):.3f}"]
        else:
            cells += ["–", "–"]
        cells.append(f"{built['peak'] / 1e9:.2f}" if built else "–")
        lines.append("| " + " | ".join([*cells, f"{found['frozen bytes'] / 1e9:.2f}"]) + " |")
    return "\n".join(lines)


def verdict(judged):
    """The goals and what was measured, as Markdown."""
    lines = ["| goal | wanted | measured | |", "|---|---|---|---|"]
    for goal, value, met in judged:
        measured = "–" if value is None else f"{value:.3g}"
        lines.append(f"| {goal.name} | {goal.sign} {goal.wanted:g} | {measured} | {'met' if met else 'missed'} |")
    return "\n".join(lines)


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


def measure_family(folder, family, size, device, repeats, updates, compiled, only=None, batch=None):
    """All that is reported of a family, a dict: of all runs or those of the names in `only`, which builds no cache by
    itself; `batch` takes the place of each run's own."""
    import models

    cost, real = models.count(family, size), models.count(family, "real")
    bench = Bench(folder, family, size, device, repeats, updates)
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
