"""From a hub, and back to it: a real client and a real server, on loopback."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KANDINSKY, ROOT, result_bytes
from diffusers import StableDiffusionPipeline
from hub_server import DRAW, Hub, card_problems, front_matter
from test_result import drawn

from training_utils.run import checkpoints
from training_utils.run.hub import upload
from training_utils.run.hub.upload import Uploads

LOOK = ["--validation_num_inference_steps", "2", "--validation_steps", "6"]
PROMPTS = ["--validation_prompts", "a handwritten one", "--- : a [two] 'three'", *LOOK]
MINE, READER, OTHER = "hf_mine", "hf_mine_to_read", "hf_of_another"


@pytest.fixture(scope="module")
def hub(sd, images, tmp_path_factory):
    """The hub of this module; `some/base` has a licence, and a branch `older` with other weights and a variant."""
    folder = tmp_path_factory.mktemp("published")
    base = shutil.copytree(sd, folder / "base")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: our-own\nlicense_link: LICENSE.md\n---\n# base\n"
    )
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    pipeline.save_pretrained(folder / "older")
    pipeline.save_pretrained(folder / "older", variant="fp16")
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add("some/base", base)
        hub.add("some/base", folder / "older", branch="older")
        hub.add("some/images", images, kind="datasets")
        hub.add("some/secret", sd, private=True)
        hub.add("some/gated", sd, gated=True)
        hub.add("some/card", folder / "nothing")
        yield hub
        hub.assert_that_no_token_went_astray()


@pytest.fixture(autouse=True)
def no_faults(hub):
    hub.faults.clear()


def argv(run, out, *more):
    """A runner's command line with model and dataset from the hub."""
    words = run.argv(out, "--dataset_name", "some/images", *more)
    for flag in run.models[::2]:
        if words.index(flag) == len(words) - 1 - words[::-1].index(flag):  # the test gives no other
            words[words.index(flag) + 1] = "some/base"
    return [f"{run.script}.py", *words]


def local_files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


def test_there_and_back(run, hub, machine, tmp_path):
    """Base and images come from the hub, the result goes there; what others download draws the same image."""
    out = tmp_path / "out"
    flags = ["--push_to_hub", "--hub_model_id", "me/result", *PROMPTS]
    flags += ["--checkpointing_steps", "3", "--report_to", "tensorboard"]
    said = machine.runs(*argv(run, out, *flags), token=MINE)
    assert "pushed to me/result" in said
    repository = hub.repositories["models", "me/result"]
    assert not repository.private and list(repository.branches) == ["main"]
    sent = repository.files()
    assert sent.pop(".gitattributes")
    assert {"model_index.json", "README.md", "validation/step-000006.png", "unet/config.json"} <= set(sent)
    assert not [name for name in sent if "checkpoint" in name or "logs" in name or "events" in name]
    assert sent == {name: content for name, content in local_files(out).items() if name in sent}
    assert not [
        name for name, content in sent.items() if MINE.encode() in content or str(tmp_path).encode() in content
    ]
    image = machine.draws("me/result", tmp_path / "cache")
    assert np.array_equal(image, drawn(out)) and not np.array_equal(image, drawn(run.base))


def test_there_and_back_with_adapters(run_lora, hub, machine, tmp_path):
    out = tmp_path / "out"
    flags = ["--push_to_hub", "--hub_model_id", "adapters", "--push_checkpoints", "--checkpointing_steps", "3"]
    machine.runs(*argv(run_lora, out, *flags, "--validation_prompt", "a handwritten one", *LOOK), token=MINE)
    sent = hub.repositories["models", "me/adapters"].files()  # a name without an owner is one's own
    expected = {".gitattributes", "README.md", "pytorch_lora_weights.safetensors", "validation/step-000006.png"}
    assert set(sent) == expected
    pipeline = StableDiffusionPipeline.from_pretrained(run_lora.base)
    pipeline.load_lora_weights(out)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    local = pipeline("a handwritten one", num_inference_steps=2, generator=noise, output_type="np").images[0]
    assert np.array_equal(machine.draws("some/base", tmp_path / "cache", "me/adapters"), local)


def test_a_revision_and_a_variant(run, hub, machine, tmp_path):
    """A branch and the commit that it stands at are the same; weights that are not trained stay what they were."""
    still = ["--learning_rate", "0", "--max_train_steps", "1", "--cache_dir", tmp_path / "cache"]
    commit = hub.repositories["models", "some/base"].branches["older"]
    for name, flags in (
        ("branch", ["--revision", "older"]),
        ("commit", ["--revision", commit]),
        ("variant", ["--revision", "older", "--variant", "fp16"]),
        ("main", []),
    ):
        machine.runs(*argv(run, tmp_path / name, *still, *flags))
    older, main = result_bytes(tmp_path / "branch"), result_bytes(tmp_path / "main")
    assert result_bytes(tmp_path / "commit") == older == result_bytes(tmp_path / "variant") != main
    assert not any(older[1]["conv_out.weight"])


REFUSED = {  # base model, token: what is said of it
    ("no/such", None): "there is no such repository, or it is private",
    ("no/such", MINE): "there is no such repository, or it is private",
    ("some/secret", None): "there is no such repository, or it is private",
    ("some/secret", OTHER): "there is no such repository, or it is private",
    ("some/gated", None): "it is gated; ask for access on its page",
    ("some/gated", OTHER): "it is gated; ask for access on its page",
    ("some/base", "hf_mistyped"): "the hub asks for a valid token (401); `hf auth login` stores one",
    ("some/base --revision never", None): "it has no such revision",
    ("some/base --variant fp61", None): "has no weights of --variant fp61",
    ("not an id", None): "is neither a folder nor found on the hub",
}


@pytest.mark.parametrize(("base", "token"), REFUSED)
def test_a_base_model_that_the_hub_refuses(run, machine, images, tmp_path, base, token):
    words = base.split(" ") if "--" in base else [base]
    flags = ["--train_data_dir", images, "--cache_dir", tmp_path / "cache"]
    argv = [f"{run.script}.py", *run.argv(tmp_path / "out", "--pretrained_model_name_or_path", *words, *flags)]
    _, said = machine(*argv, token=token)
    assert machine.fails(*argv, token=token, code=2).startswith(f"base model {words[0]} ")
    assert REFUSED[base, token] in said and len(said.strip().splitlines()) <= 2, said
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["no/images", "some/secret"])
def test_a_data_set_that_the_hub_refuses(run, machine, tmp_path, name):
    sentence = machine.fails(*argv(run, tmp_path, "--dataset_name", name), code=2)
    assert name in sentence and "doesn't exist on the Hub or cannot be accessed" in sentence


PUSH_REFUSED = {  # repository, token, more flags: what is said before training
    ("me/result", None, ""): "the hub asks for a valid token (401)",
    ("me/result", "hf_mistyped", ""): "the hub asks for a valid token (401)",
    ("me/another", READER, ""): "the token has no right to it (403: ",
    ("some/base", MINE, ""): "the token has no right to it (403: ",
    ("me/public", MINE, "--hub_private_repo"): "me/public already exists and is public",
}


@pytest.mark.parametrize(("name", "token", "flags"), PUSH_REFUSED)
def test_a_push_that_would_be_refused_is_refused_before_training(run, hub, machine, tmp_path, name, token, flags):
    if name == "me/public" and ("models", name) not in hub.repositories:
        hub.create("models", name)
    words = argv(run, tmp_path / "out", "--push_to_hub", "--hub_model_id", name, *flags.split())
    sentence = machine.fails(*words, token=token, code=2)
    assert PUSH_REFUSED[name, token, flags] in sentence and "\n" not in sentence
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_private_repository(run, hub, machine, tmp_path):
    flags = ["--push_to_hub", "--hub_private_repo", "--max_train_steps", "1"]
    machine.runs(*argv(run, tmp_path / "hidden", *flags), token=MINE)  # named after the folder
    repository = hub.repositories["models", "me/hidden"]
    assert repository.private and "model_index.json" in repository.files()
    machine.runs(*argv(run, tmp_path / "hidden", *flags), token=MINE)  # once more: it is private already
    code, said = machine("-c", DRAW, "me/hidden", tmp_path / "cache", "", token=OTHER)
    assert code != 0 and "me/hidden" in said


def test_an_upload_that_fails_for_good(run, hub, machine, tmp_path):
    """The result stands; the command that is printed, pasted into a terminal, uploads it."""
    out = tmp_path / "out put"
    hub.fails("PUT", "/lfs/", 500, times=99)
    flags = ["--push_to_hub", "--hub_model_id", "me/later", "--max_train_steps", "1", "--seed", "8"]
    sentence = machine.fails(*argv(run, out, *flags, "--checkpointing_steps", "1"), token=MINE, code=1)
    assert f"the model is in {out}" in sentence and "\n" not in sentence and MINE not in sentence
    assert set(hub.repositories["models", "me/later"].files()) == {".gitattributes"}
    hub.faults.clear()
    words = shlex.split(sentence.split(" with: ")[1])
    assert words[:2] == ["hf", "upload"]
    machine.runs(
        "-c", "from huggingface_hub.cli.hf import main; import sys; sys.argv = words; main()", *words, token=MINE
    )
    sent = hub.repositories["models", "me/later"].files()
    assert {"model_index.json", "README.md"} < set(sent) and not [name for name in sent if "checkpoint" in name]
    assert np.array_equal(machine.draws("me/later", tmp_path / "cache"), drawn(out))


def test_a_hub_that_stumbles(run, hub, machine, tmp_path):
    """An answer 500, a connection that breaks while something is sent, one that breaks while something is read."""
    hub.fails("GET", "/lfs/", "cut")
    hub.fails("PUT", "/lfs/", "reset", times=2)
    hub.fails("POST", "/preupload/", 503)
    flags = ["--push_to_hub", "--hub_model_id", "me/patience", "--max_train_steps", "1", "--seed", "9"]
    out = tmp_path / "out"
    machine.runs(*argv(run, out, *flags, "--cache_dir", tmp_path / "cache"), token=MINE)
    assert not any(times for *_, times in hub.faults)
    sent = hub.repositories["models", "me/patience"].files()
    assert (
        sent["unet/diffusion_pytorch_model.safetensors"]
        == local_files(out)["unet/diffusion_pytorch_model.safetensors"]
    )


# --- the model card --------------------------------------------------------------------------------------------------

VALIDATE = """
from huggingface_hub import ModelCard

card = ModelCard.load(words[0])
card.validate()
assert card.data.to_dict() == ModelCard.load(words[1]).data.to_dict()
"""


def test_the_card_is_valid_and_complete(run, hub, machine, tmp_path):
    out = tmp_path / "out"
    machine.runs(*argv(run, out, "--push_to_hub", "--hub_model_id", "me/carded", *PROMPTS), token=MINE)
    machine.runs("-c", VALIDATE, out / "README.md", "me/carded")
    card = (out / "README.md").read_text()
    assert card_problems(card) == ([], [])
    data = front_matter(card)
    assert data["base_model"] == "some/base" and data["datasets"] == ["some/images"]
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "text-to-image"
    assert (data["license"], data["license_name"]) == ("other", "our-own")
    assert data["license_link"] == f"{hub.url}/some/base/blob/main/LICENSE.md"
    assert {"stable-diffusion", "text-to-image"} <= set(data["tags"])
    url = "validation/step-000006.png"
    assert data["widget"] == [{"text": "a handwritten one, --- : a [two] 'three'", "output": {"url": url}}]
    assert hub.repositories["models", "me/carded"].files()[url] == (out / url).read_bytes()


def test_a_card_of_local_things_claims_nothing(run, machine, images, tmp_path):
    """A folder is no id on the hub, and neither is the name of a loader."""
    flags = ["--dataset_name", "imagefolder", "--train_data_dir", images, "--max_train_steps", "1"]
    machine.runs(f"{run.script}.py", *run.argv(tmp_path, *flags))
    data = front_matter((tmp_path / "README.md").read_text())
    assert not {"base_model", "datasets", "license", "widget"} & set(data)


@pytest.mark.parametrize(
    "wrong", ["base_model: /home/me/base", "license: mine", "pipeline_tag: [draw]", "widget: [{text: ''}]"]
)
def test_the_server_tells_a_wrong_card(machine, tmp_path, wrong):
    (tmp_path / "README.md").write_text(f"---\n{wrong}\n---\n")
    code, said = machine("-c", VALIDATE, tmp_path / "README.md", "some/base")
    assert code != 0 and wrong.split(":")[0] in said


# --- checkpoints -----------------------------------------------------------------------------------------------------

FETCH = """
from huggingface_hub import snapshot_download

snapshot_download(words[0], revision="checkpoints", allow_patterns=words[1] + "/*", local_dir=words[2])
"""


def pushed(hub, name):
    """The checkpoints of a repository: {name: {path: content}}."""
    found = {}
    for path, content in hub.repositories["models", name].files("checkpoints").items():
        if "/" in path:
            found.setdefault(path.split("/")[0], {})[path.split("/", 1)[1]] = content
    return found


def test_checkpoints_are_pushed_and_resumed_from(run, hub, machine, tmp_path):
    """On another machine the run goes on from one of them to the same weights."""
    flags = ["--push_to_hub", "--push_checkpoints", "--hub_model_id", "me/kept", "--checkpointing_steps", "2"]
    said = machine.runs(*argv(run, tmp_path / "out", *flags, "--use_ema"), token=MINE)
    assert "pushed checkpoint-4 to branch checkpoints of me/kept" in said
    kept = pushed(hub, "me/kept")
    assert kept == {f"checkpoint-{step}": local_files(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4, 6)}
    assert not [path for path in hub.repositories["models", "me/kept"].files() if "checkpoint" in path]
    assert not (tmp_path / "out" / ".uploads").exists()
    machine.runs("-c", FETCH, "me/kept", "checkpoint-4", tmp_path / "there")
    assert checkpoints.damage_of(tmp_path / "there" / "checkpoint-4") is None
    resumed = ["--use_ema", "--resume_from_checkpoint", "latest", "--cache_dir", tmp_path / "cache"]
    said = machine.runs(*argv(run, tmp_path / "there", *resumed))
    assert "checkpoint-4, after step 4" in said and "warning" not in said
    assert result_bytes(tmp_path / "there") == result_bytes(tmp_path / "out")


def test_a_hub_that_takes_no_checkpoints_costs_warnings(run, hub, machine, tmp_path):
    hub.fails("POST", "/preupload/checkpoints", "reset", times=6)  # each attempt of the client for the first one
    hub.fails("POST", "/commit/checkpoints", 500)
    flags = ["--push_to_hub", "--push_checkpoints", "--hub_model_id", "me/unkept", "--checkpointing_steps", "2"]
    said = machine.runs(*argv(run, tmp_path / "out", *flags), token=MINE)
    warnings = [line for line in said.splitlines() if line.startswith("warning: checkpoint-")]
    assert len(warnings) == 2 and all("its upload failed" in line and "the run continues" in line for line in warnings)
    assert list(pushed(hub, "me/unkept")) == ["checkpoint-6"]
    hub.faults.clear()
    words = shlex.split(warnings[0].split(" with: ")[1])
    machine.runs(
        "-c", "from huggingface_hub.cli.hf import main; import sys; sys.argv = words; main()", *words, token=MINE
    )
    assert pushed(hub, "me/unkept")["checkpoint-2"] == local_files(tmp_path / "out" / "checkpoint-2")
    assert result_bytes(tmp_path / "out") and "model_index.json" in hub.repositories["models", "me/unkept"].files()


@pytest.fixture
def line(monkeypatch):
    """A line to the hub on which nothing moves until `open` is set: `sent` is what then went over it."""
    import huggingface_hub

    line = type("", (), {"open": threading.Event(), "begun": threading.Event(), "sent": {}})

    def upload(api, folder_path, path_in_repo, **_):
        line.begun.set()
        assert line.open.wait(20)
        line.sent[path_in_repo] = local_files(folder_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    yield line
    line.open.set()


def test_an_upload_holds_back_neither_the_run_nor_rotation(tmp_path, line):
    """What is being uploaded is uploaded whole, though it is gone meanwhile; what has not begun is left out."""
    uploads = Uploads("me/model", None, tmp_path)
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    for folder in folders:
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_text(folder.name)
    assert uploads.add(folders[0]) == folders[0] and line.begun.wait(20)
    assert uploads.add(None) is None
    shutil.rmtree(folders[0])
    for folder in folders[1:]:
        uploads.add(folder)
    shutil.rmtree(folders[1])
    assert not line.sent
    line.open.set()
    uploads.finish()
    assert line.sent == {f"checkpoint-{step}": {"unet/weights": f"checkpoint-{step}".encode()} for step in (1, 3)}
    assert not (tmp_path / ".uploads").exists()


def test_processes_wait_for_an_upload_a_little_at_a_time(tmp_path, line, monkeypatch):
    """A collective call that is as long as an upload would run into the process group's timeout."""
    uploads, asked = Uploads("me/model", None, tmp_path), []
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.setattr(upload, "WAIT", 0.05)

    def ask(make):
        asked.append(make())
        if len(asked) == 3:
            line.open.set()
        return asked[-1]

    assert uploads.add_last(tmp_path / "checkpoint-1", ask) == tmp_path / "checkpoint-1"
    assert asked[:3] == [True] * 3 and asked[-1] is False and "checkpoint-1" in line.sent


def test_without_hard_links_a_checkpoint_is_uploaded_from_its_place(tmp_path, line, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "weights").write_text("one")
    uploads = Uploads("me/model", None, tmp_path)
    line.open.set()
    uploads.add(tmp_path / "checkpoint-1")
    uploads.finish()
    assert line.sent == {"checkpoint-1": {"weights": b"one"}} and (tmp_path / "checkpoint-1").exists()


# --- the command line itself, and the other scripts ------------------------------------------------------------------


@pytest.mark.slow
def test_a_command_that_is_interrupted_leaves_its_checkpoint_on_the_hub(run, hub, machine, tmp_path):
    """The whole way of a user on a machine that is removed, from an empty home; the token is a flag."""
    out = tmp_path / "out"
    flags = ["--push_to_hub", "--push_checkpoints", "--hub_model_id", "me/spot", "--hub_token", MINE]
    flags += ["--checkpointing_steps", "20", "--checkpoints_total_limit", "1", "--max_train_steps", "9000"]
    script, *words = argv(run, out, *flags)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *words],
        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT),
        env=machine.environment | {"HF_HOME": str(tmp_path / "home")},
    )
    while not any(out.glob("checkpoint-*")):
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    (last,) = out.glob("checkpoint-*")
    assert pushed(hub, "me/spot")[last.name] == local_files(last)
    assert MINE not in said and "--resume_from_checkpoint latest" in said
    everything = b"".join(
        p.read_bytes() for p in hub.repositories["models", "me/spot"].folder.rglob("*") if p.is_file()
    )
    assert MINE.encode() not in everything


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KANDINSKY, "run_sdxl", "run_lora_sdxl"])
def test_the_other_scripts(request, hub, machine, tmp_path, name):
    run = request.getfixturevalue(name)
    bases = []
    for flag, folder in zip(run.models[::2], run.models[1::2]):
        hub.add(f"some/{Path(folder).parent.name}-{Path(folder).name}", folder)
        bases += [flag, f"some/{Path(folder).parent.name}-{Path(folder).name}"]
    flags = ["--push_to_hub", "--hub_model_id", f"me/{name}", "--push_checkpoints", "--checkpointing_steps", "3"]
    out, cache = tmp_path / "out", ["--cache_dir", tmp_path / "cache"]
    machine.runs(*argv(run, out, *bases, *flags, *cache), token=MINE)
    sent = hub.repositories["models", f"me/{name}"].files()
    sent.pop(".gitattributes")
    assert sent == {path: content for path, content in local_files(out).items() if path in sent}
    assert any(path.endswith(".safetensors") for path in sent) and not [p for p in sent if "checkpoint" in p]
    assert card_problems(sent["README.md"].decode()) == ([], [])
    assert front_matter(sent["README.md"].decode())["base_model"] in bases
    assert set(pushed(hub, f"me/{name}")) == {"checkpoint-3", "checkpoint-6"}
    run(tmp_path / "local")
    assert result_bytes(out) == result_bytes(tmp_path / "local"), "where model and images lie is no difference"


@pytest.mark.slow
def test_jax(run, hub, machine, tmp_path):
    pytest.importorskip("jax")
    run_jax = type(run)("train_text_to_image_flax", run.base, run.images)
    flags = ["--push_to_hub", "--hub_model_id", "me/jax", "--push_checkpoints", "--checkpointing_steps", "3"]
    machine.runs(*argv(run_jax, tmp_path / "out", *flags), token=MINE)
    assert np.array_equal(machine.draws("me/jax", tmp_path / "cache"), drawn(tmp_path / "out"))
    assert set(pushed(hub, "me/jax")) == {"checkpoint-3", "checkpoint-6"}
    assert machine.fails(*argv(run_jax, tmp_path / "no", "--pretrained_model_name_or_path", "no/such"), code=2) == (
        "base model no/such is neither a folder nor found on the hub: there is no such repository, or it is private"
        " and `hf auth login` has not been run with a right to it"
    )
