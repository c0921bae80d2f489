import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "quickstart"), str(ROOT / "tests")]
pytest.register_assert_rewrite("processes")  # whose assertions then show their values
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
if "TEST_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # JAX compiles twice as fast
os.environ.pop("COLUMNS", None)  # lines are as wide as in a pipe, whatever terminal the tests are started from
os.environ["OMP_NUM_THREADS"] = "1"  # here and in the processes started: sums over threads round by their number

from forked import Forked  # noqa: E402
from tiny import build_kandinsky_decoder, build_kandinsky_prior, build_sd, build_sdxl, write_images  # noqa: E402

from training_utils.base.errors import UserError  # noqa: E402


def pytest_collection_modifyitems(items):
    """Tests of JAX come last: torch's data workers are forks, which JAX's threads do not go well with."""
    items.sort(key=lambda item: item.path.name.startswith("test_flax"))


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion folder that predicts epsilon."""
    return build_sd(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A tiny Stable Diffusion XL folder."""
    return build_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="session")
def kandinsky(tmp_path_factory):
    """The folders of a tiny Kandinsky 2.2 prior and decoder."""
    folder = tmp_path_factory.mktemp("kandinsky")
    return build_kandinsky_prior(folder / "prior"), build_kandinsky_decoder(folder / "decoder")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of ten captioned images."""
    return write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture
def recomputed(monkeypatch):
    """A list that grows by each part of a network whose activations are recomputed in the backward pass."""
    import torch.utils.checkpoint

    parts, checkpoint = [], torch.utils.checkpoint.checkpoint

    def counted(function, *args, **options):
        parts.append(function)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    return parts


def reset_accelerate():
    """Let one process hold one run after the other: accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Runner:
    """Runs one script on a tiny base model: `run(out, "--flag", ...)` returns main's exit code.

    `base` is its folder; for Kandinsky, the folders of the prior and of the decoder.
    """

    def __init__(self, script, base, images):
        self.script, self.base, self.images = script, base, images
        names = ("prior_", "decoder_") if isinstance(base, tuple) else ("",)
        folders = base if isinstance(base, tuple) else (base,)
        pairs = [(f"--pretrained_{name}model_name_or_path", folder) for name, folder in zip(names, folders)]
        self.models = [word for pair in pairs for word in pair]

    def argv(self, out, *more):
        """The command line; a flag in `more` comes last and so replaces the one here."""
        names_data = {"--dataset_name", "--train_data_config"} & set(map(str, more))
        folder = [] if names_data else ["--train_data_dir", self.images]
        plain = "--resolution 16 --train_batch_size 4 --max_train_steps 6 --learning_rate 1e-3 --seed 7"
        plain += " --report_to none --checkpointing_steps 0"
        start = [*self.models, "--output_dir", out, *folder, *plain.split()]
        return [*map(str, start), *map(str, more)]

    def __call__(self, out, *more):
        reset_accelerate()
        return importlib.import_module(self.script).main(self.argv(out, *more))

    def fails(self, out, *more):
        """Run, expecting an error that a user can fix; returns (sentence, exit code)."""
        with pytest.raises(UserError) as caught:
            self(out, *more)
        return str(caught.value), caught.value.exit_code

    def start(self, out, *more, launcher=(sys.executable,), **options):
        """Start it as a process of its own, as a user does; returns the Popen."""
        return subprocess.Popen(
            [*launcher, str(ROOT / f"{self.script}.py"), *self.argv(out, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **({"cwd": ROOT} | options),
        )

    def fork(self, out, *more, processes=1, through=()):
        """Start it as one process, or several, without the seconds that importing torch and a launcher take; through
        a program that is called with the script's command line, where one is given."""
        words = [*map(str, through), str(ROOT / f"{self.script}.py"), *self.argv(out, *more)]
        return Forked(words, ROOT, processes, free_port())

    def on_two_processes(self, out, *more):
        """Run it to its end on two processes; returns what it printed."""
        process = self.fork(out, *more, processes=2)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said


@pytest.fixture(scope="session")
def run(sd, images):
    return Runner("train_text_to_image", sd, images)


@pytest.fixture(scope="session")
def run_lora(sd, images):
    return Runner("train_text_to_image_lora", sd, images)


@pytest.fixture(scope="session")
def run_sdxl(sdxl, images):
    return Runner("train_text_to_image_sdxl", sdxl, images)


@pytest.fixture(scope="session")
def run_lora_sdxl(sdxl, images):
    return Runner("train_text_to_image_lora_sdxl", sdxl, images)


@pytest.fixture(scope="session")
def run_prior(kandinsky, images):
    return Runner("train_text_to_image_prior", kandinsky, images)


@pytest.fixture(scope="session")
def run_lora_prior(kandinsky, images):
    return Runner("train_text_to_image_lora_prior", kandinsky, images)


@pytest.fixture(scope="session")
def run_decoder(kandinsky, images):
    return Runner("train_text_to_image_decoder", kandinsky, images)


@pytest.fixture(scope="session")
def run_lora_decoder(kandinsky, images):
    return Runner("train_text_to_image_lora_decoder", kandinsky, images)


KANDINSKY = ["run_prior", "run_lora_prior", "run_decoder", "run_lora_decoder"]
RUNNERS = ["run", "run_lora", "run_sdxl", "run_lora_sdxl", *KANDINSKY]
# In the ordinary suite four stand for all, whose loops are the same lines, as tests/test_siblings.py sees to.
STAND = ["run", "run_lora_sdxl", "run_prior", "run_lora_decoder"]
EACH = [pytest.param(name, marks=[] if name in STAND else pytest.mark.slow) for name in RUNNERS]


@pytest.fixture(params=EACH)
def each(request):
    """The runner of every script in turn."""
    return request.getfixturevalue(request.param)


VALIDATION = ["--use_ema", "--validation_split", "0.3", "--validation_steps", "3", "--report_to", "tensorboard"]
IMAGES = ["--validation_num_inference_steps", "2"]


@pytest.fixture(scope="session")
def one_process(run, tmp_path_factory):
    """A run of one process, with a checkpoint after steps 3 and 6."""
    out = tmp_path_factory.mktemp("one_process") / "out"
    run(out, *VALIDATION, *IMAGES, "--checkpointing_steps", "3", "--validation_prompts", "one", "two", "three")
    return out


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def machine(hub, tmp_path_factory):
    """A client of the hub that a module's own fixture serves."""
    from hub_server import Machine

    machine = Machine(hub, tmp_path_factory.mktemp("machine"))
    yield machine
    machine.process.kill()
    machine.process.wait()


def result_file(out):
    """The file of the trained weights in a result."""
    weights = "diffusion_pytorch_model.safetensors"
    places = [
        Path(out) / "pytorch_lora_weights.safetensors",
        *(Path(out) / part / weights for part in ("prior", "unet")),
    ]
    return next(path for path in places if path.exists())


def result_bytes(out):
    """The trained weights and their metadata, to compare to the bit: safetensors orders metadata at random."""
    import torch
    from safetensors import safe_open

    def content(tensor):
        return tensor.flatten().view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16

    with safe_open(result_file(out), "pt") as file:
        return file.metadata(), {name: content(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def result_weights(out):
    """The trained weights, name to tensor."""
    from safetensors.torch import load_file

    return load_file(result_file(out))


def relative_difference(out, other):
    """Distance of two runs' weights over their norm."""
    one, two = result_weights(out), result_weights(other)
    distance = sum((one[name].double() - two[name].double()).square().sum() for name in one)
    return float((distance / sum(weight.double().square().sum() for weight in one.values())).sqrt())


def logged(out, name="train_loss"):
    """What the run wrote to TensorBoard under a name: {step: value}, of two runs that of the later."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for events in sorted(Path(out).glob("logs/**/events*"), key=lambda path: path.stat().st_mtime_ns):
        log = EventAccumulator(str(events))
        log.Reload()
        if name in log.Tags()["scalars"]:
            values |= {entry.step: entry.value for entry in log.Scalars(name)}
    return values
