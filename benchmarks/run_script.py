"""Runs one training script as a user does, in a process of its own, and measures it on request.

    python benchmarks/run_script.py steps|building SCRIPT FLAGS...

With `steps` it trains until its optimizer has its state and then does what it is told, a line on stdin each: "script
N" makes N steps, "bare N" makes N bare steps of the trained network, "end" ends it. With `building` it lets the
script build its cache for each "build" that it is told, and makes the bare encoders' calls too: on a CPU each right
after the script's own, on a GPU all of them once the cache stands. Each line is answered by one of JSON on stdout.
Nothing of this is in the scripts: their functions are wrapped from outside.
"""

import copy
import importlib
import json
import os
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

WARM_UP = 2  # the first step makes the optimizer's state, and may compile


def mapped_entries():
    """The bytes in memory of a cache's mapped files: the system's, which takes them back when it needs room."""
    size, counts = 0, False
    if os.path.exists("/proc/self/smaps"):
        with open("/proc/self/smaps") as lines:
            for line in lines:
                if "-" in line.split()[0]:  # the addresses of a mapping, and its file
                    counts = "/pictures-" in line or "/captions-" in line
                elif counts and line.startswith("Rss:"):
                    size += 1024 * int(line.split()[1])
    return size


def peak():
    """The largest memory that this process has taken, in bytes: on the GPU where it computes there."""
    if "jax" in sys.modules:
        statistics = sys.modules["jax"].local_devices()[0].memory_stats()
        if statistics:
            return statistics["peak_bytes_in_use"]
    elif sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated()
    return resident_peak() - mapped_entries()


def resident_peak():
    """The most host memory that this process has had since `forget_peak`, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        from training_utils.base import environment

        return environment.peak_memory()
    # Not ru_maxrss, which a process inherits: it is never below the memory of the one that started it.
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak():
    """Start counting the largest memory again, where the system can: what a network takes while it is loaded passes
    through host memory, and a GPU's never holds it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def synchronise(value=None):
    """Wait until the device has done all that it was told, for JAX all that `value` needs."""
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(value)
    elif sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()


class Dialogue:
    """Takes lines from stdin and answers them on what was stdout; what the script prints goes to stderr."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def answer(self, **values):
        print(json.dumps(values), file=self.answers)

    def asked(self):
        """The next line as words; without one, since whoever asks is gone, this process ends."""
        words = sys.stdin.readline().split()
        if not words or words[0] == "end":
            if words:
                self.answer(peak=peak())
            os._exit(0)  # the result is of no use
        return words


class StepWatcher:
    """Stands behind `Progress.update` of run/progress.py, which every script calls once a step."""

    def __init__(self, dialogue):
        self.dialogue, self.left, self.began, self.step = dialogue, WARM_UP, None, None

    def watch(self):
        from training_utils.run.progress import Progress

        original, begin = Progress.update, Progress.__init__

        def begun(progress, *rest):
            begin(progress, *rest)
            forget_peak()

        def update(progress, state, loss, *rest):
            original(progress, state, loss, *rest)
            self.left -= 1
            if not self.left:
                synchronise(loss)
                self.dialogue.answer(seconds=time.perf_counter() - self.began if self.began else None)
                self.obey()

        Progress.update, Progress.__init__ = update, begun

    def watch_frozen(self):
        """Have all of each frozen network in memory that a step needs, as a GPU has it: a CPU maps weights from their
        files, and of what no step reads, such as the VAE's decoder, nothing would count."""
        from training_utils.torch_backend import frozen

        original = frozen.place_frozen

        def place_frozen(*args, **kwargs):
            network = original(*args, **kwargs)
            for weight in network.parameters() if network is not None else ():
                weight.sum()
            return network

        frozen.place_frozen = place_frozen

    def watch_network(self):
        """Keep what the trained network is called with first, and its optimizer."""
        from accelerate import Accelerator

        original = Accelerator.prepare

        def prepare(accelerator, *objects):
            prepared = original(accelerator, *objects)
            network, optimizer = prepared

            def remember_call(_, args, kwargs):
                self.step = partial(bare_step, network, optimizer.optimizer, args, kwargs)
                hook.remove()

            hook = network.register_forward_pre_hook(remember_call, with_kwargs=True)
            return prepared

        Accelerator.prepare = prepare

    def obey(self):
        while True:
            what, number = self.dialogue.asked()
            self.began = time.perf_counter()
            if what == "script":
                self.left = int(number)
                return
            for _ in range(int(number)):
                self.step()
            synchronise()
            self.dialogue.answer(seconds=time.perf_counter() - self.began)


def bare_step(network, optimizer, args, kwargs):
    """Forward, backward and step of a network on ready tensors, and nothing else; its targets are zero."""
    network(*args, **kwargs)[0].float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class CacheWatcher:
    """Stands in for what builds a cache: builds it again in each turn and runs the bare encoders as often.

    On a CPU, where nothing else is at work while they are, each of their calls is made a second time at once: the two
    meet the same machine, whatever it does beside. On a GPU the bare calls follow when the cache stands.
    """

    def __init__(self, dialogue):
        self.dialogue, self.calls, self.inside, self.bare = dialogue, {}, False, 0.0

    def watch(self):
        from training_utils.cache import captions, images

        for module, name in ((images, "cache_images"), (captions, "cache_captions")):
            setattr(module, name, partial(self.build_in_turns, getattr(module, name), name))

    def watch_encoders(self):
        import diffusers
        import transformers

        for cls, name in (
            (diffusers.AutoencoderKL, "encode"),
            (diffusers.VQModel, "encode"),
            (transformers.CLIPTextModel, "forward"),
            (transformers.CLIPTextModelWithProjection, "forward"),
            (transformers.CLIPVisionModelWithProjection, "forward"),
        ):
            setattr(cls, name, self.remembered(getattr(cls, name)))

    def remembered(self, original):
        """`original`, a method, repeated on a CPU, and elsewhere remembering how often it is called from outside, and
        with what first."""

        def call(network, *args, **kwargs):
            if self.inside:
                return original(network, *args, **kwargs)
            self.inside = True
            try:
                made = original(network, *args, **kwargs)
                again = partial(original, network, *args, **kwargs)
                if network.device.type == "cpu":
                    began = time.perf_counter()
                    again()
                    self.bare += time.perf_counter() - began
                else:
                    self.calls.setdefault(id(network), [again, 0])[1] += 1
                return made
            finally:
                self.inside = False

        return call

    def build_in_turns(self, original, name, store, *rest, **options):
        import torch

        self.dialogue.answer(what=name)
        while self.dialogue.asked()[0] == "build":
            for path in store.folder.glob("*"):
                path.unlink()
            empty = copy.copy(store)
            empty.forget()
            self.calls.clear()
            self.bare, began = 0.0, time.perf_counter()
            original(empty, *rest, **options)
            synchronise()
            build = time.perf_counter() - began - self.bare
            self.inside, began = True, time.perf_counter()
            with torch.inference_mode():
                for again, number in self.calls.values():
                    for _ in range(number):
                        again()
            synchronise()
            self.inside = False
            self.dialogue.answer(build=build, bare=self.bare or time.perf_counter() - began)


def main(kind, script, *argv):
    dialogue, jax = Dialogue(), script.endswith("flax")
    watchers = [StepWatcher(dialogue)] + ([CacheWatcher(dialogue)] if kind == "building" else [])
    sys.argv[1:] = argv
    module = importlib.import_module(script)
    for watcher in watchers:
        watcher.watch()
    if not jax:
        watchers[0].watch_frozen()
        watchers[0].watch_network()
        if kind == "building":
            watchers[1].watch_encoders()
    from training_utils.run import exit

    exit.run_main(module.main)


if __name__ == "__main__":
    main(*sys.argv[1:])
