"""The runs of the throughput benchmark: which there are, their processes, and how they take turns."""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parent.parent

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


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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
        except BrokenPipeError as error:
            raise self.failure() from error

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

    def __init__(self, folder, family, size, device, repeats, steps):
        import models

        self.folder = folder
        self.family = family
        self.device = device
        self.repeats = repeats
        self.steps = steps
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
            pairs = [(run, stack.enter_context(self.child("steps", run, environment))) for run in runs]
            _each(pairs, lambda run, child: child.answer())  # warmed up
            for _ in range(repeats):
                _each(pairs, self.turn)
            _each(pairs, lambda run, child: setattr(run, "peak", max(run.peak, child.ask("end")["peak"])))

    def turn(self, run, child):
        run.step.append(child.ask("script", self.steps)["seconds"] / self.steps)
        if self.family != "flax":
            run.bare.append(child.ask("bare", self.steps)["seconds"] / self.steps)

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
    """`work(run, child)` for each pair; a run that fails, for example out of memory, is left out from then on."""
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
