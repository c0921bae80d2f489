"""The command line that users know is the one they get, and a wrong one is answered at once in one sentence."""

import ast
import json
import re
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

import train_text_to_image
import train_text_to_image_flax
import train_text_to_image_lora_sdxl
from training_utils import cli
from training_utils.cli import optimizers, packages, table
from training_utils.cli.options import OptimizerOptions
from training_utils.cli.values import plain_type
from training_utils.torch_backend.optimizers import make_optimizer

# What each script's users know (name, type, default, choices), and what this suite adds, each in every script alike.
KNOWN = json.loads((ROOT / "tests" / "known_flags.json").read_text())
OURS = {
    "caption_dropout": (float, 0.0),
    "ema_decay": (float, 0.9999),
    "rescale_betas_zero_snr": (bool, False),
    "lr_num_cycles": (int, 1),
    "lr_power": (float, 1.0),
    "optimizer": (str, "adamw"),
    "validation_steps": (int, None),
    "validation_at_start": (bool, False),
    "validation_num_inference_steps": (int, 20),
    "validation_guidance_scale": (float, 7.5),
    "validation_split": (float, 0.0),
    "process_group_timeout": (int, 1800),
    "logging_steps": (int, 10),
    "cache_latents": (bool, False),
    "cached_crops": (int, 1),
    "cache_text_embeddings": (bool, False),
    "encoding_cache_dir": (str, None),
    "on_nan": (str, "stop"),
    "on_bad_sample": (str, "error"),
    "check_data": (bool, False),
    "config": (str, None),
    "dry_run": (bool, False),
    "hub_private_repo": (bool, False),
    "push_checkpoints": (bool, False),
    "train_data_config": (str, None),
    "repeats_from_folders": (bool, False),
    "shuffle_tags": (bool, False),
    "keep_tokens": (int, 0),
    "streaming": (bool, False),
    "shuffle_buffer": (int, 10_000),
    "ignore_color_profiles": (bool, False),
}
OURS_FOR_PIXELS = {  # not for the priors, whose images CLIP sizes, and not for JAX, which compiles one shape
    "aspect_ratio_bucketing": (bool, False),
    "min_bucket_reso": (int, None),
    "max_bucket_reso": (int, None),
    "bucket_reso_steps": (int, 64),
}
OURS_FOR_SINGLE_FILES = {"single_file_config": (str, None)}  # Stable Diffusion and SDXL
OURS_FOR_EVERY_WEIGHT = {
    "fused_backward_pass": (bool, False),
    "full_bf16": (bool, False),
}
OURS_FOR_ADAPTERS = {
    "lora_alpha": (float, None),
    "lora_dropout": (float, 0.0),
    "use_dora": (bool, False),
    "save_kohya_format": (bool, False),
}
OURS_FOR_KANDINSKY = {
    "prior_revision": (str, None),
    "decoder_revision": (str, None),
    "random_crop": (bool, False),
    "reducing_gap": (float, 1.0),
    "image_interpolation_mode": (str, "bicubic"),
    "validation_guidance_scale": (float, 4.0),
}
# Known from one script and taken over by others.
ELSEWHERE = {
    "use_ema": (bool, False),
    "offload_ema": (bool, False),
    "foreach_ema": (bool, False),
    "input_perturbation": (float, 0.0),
    "dream_training": (bool, False),
    "dream_detail_preservation": (float, 1.0),
    "tracker_project_name": (str, "text2image-fine-tune"),
    "train_text_encoder": (bool, False),
    "proportion_empty_prompts": (float, 0.0),
    "timestep_bias_strategy": (str, "none"),
    "timestep_bias_multiplier": (float, 1.0),
    "timestep_bias_begin": (int, 0),
    "timestep_bias_end": (int, 1000),
    "timestep_bias_portion": (float, 0.25),
    "variant": (str, None),
    "random_flip": (bool, False),
    "image_interpolation_mode": (str, "lanczos"),
    "noise_offset": (float, 0.0),
    "scale_lr": (bool, False),
    "gradient_checkpointing": (bool, False),
    "enable_xformers_memory_efficient_attention": (bool, False),
    "dataloader_num_workers": (int, 0),
    "gradient_accumulation_steps": (int, 1),
    "checkpointing_steps": (int, 500),
    "checkpoints_total_limit": (int, None),
    "resume_from_checkpoint": (str, None),
    "lr_warmup_steps": (int, 500),
    "prediction_type": (str, None),
    "snr_gamma": (float, None),
    "validation_prompts": (str, None),
    "validation_epochs": (int, 5),
    "compilation_cache_dir": (str, None),
}
EVERY_KANDINSKY = "prior_revision decoder_revision validation_guidance_scale variant random_flip scale_lr".split()
DECODER = ["image_interpolation_mode", "noise_offset", "random_crop", "reducing_gap"]
XFORMERS = "enable_xformers_memory_efficient_attention"
TAKEN_OVER = {
    "train_text_to_image.py": [],
    "train_text_to_image_lora.py": "use_ema input_perturbation dream_training dream_detail_preservation"
    " tracker_project_name train_text_encoder".split(),
    "train_text_to_image_sdxl.py": ["offload_ema", "foreach_ema", "tracker_project_name"],
    "train_text_to_image_lora_sdxl.py": "use_ema tracker_project_name proportion_empty_prompts timestep_bias_strategy"
    " timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion".split(),
    "train_text_to_image_prior.py": [
        *(*EVERY_KANDINSKY, "gradient_checkpointing", XFORMERS, "offload_ema", "foreach_ema")
    ],
    "train_text_to_image_lora_prior.py": [
        *(*EVERY_KANDINSKY, "gradient_checkpointing", XFORMERS, "use_ema", "tracker_project_name")
    ],
    "train_text_to_image_decoder.py": [*EVERY_KANDINSKY, *DECODER, "offload_ema", "foreach_ema"],
    "train_text_to_image_lora_decoder.py": [*EVERY_KANDINSKY, *DECODER, XFORMERS, "use_ema", "tracker_project_name"],
    "train_text_to_image_flax.py": "use_ema input_perturbation tracker_project_name"
    " image_interpolation_mode dataloader_num_workers gradient_accumulation_steps gradient_checkpointing"
    " checkpointing_steps checkpoints_total_limit resume_from_checkpoint lr_warmup_steps prediction_type snr_gamma"
    " noise_offset validation_prompts validation_epochs compilation_cache_dir".split(),
}
NOT_FOR_KANDINSKY = {"rescale_betas_zero_snr", "save_kohya_format"}  # its schedules are fixed, WebUI does not read it
NOT_IN_PRIOR = {"cached_crops"}  # CLIP's processor takes the middle
NOT_IN_DECODER = {"cache_text_embeddings", "shuffle_tags", "keep_tokens"}  # which reads no captions
NOT_IN_JAX = {"optimizer", "process_group_timeout", *OURS_FOR_EVERY_WEIGHT}
CHOICES_ADDED = {"lr_scheduler", "prediction_type", "report_to", "optimizer"}  # the originals find a typo much later
SCRIPTS = [name for name in KNOWN if (ROOT / name).exists()]
MINIMUM = ["--pretrained_model_name_or_path", "model", "--train_data_dir", str(ROOT)]


def flags_of(script):
    """The flags of a script, by its file's name, {name: Flag}; none stands there twice."""
    names = [flag.name for group in table.groups_of(script.removesuffix(".py")) for flag in group.flags]
    assert len(names) == len(set(names))
    return table.flags_of(script.removesuffix(".py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line_is_frozen(script):
    have = {
        name: (plain_type(flag.type), flag.default, flag.choices, flag.nargs, flag.required)
        for name, flag in flags_of(script).items()
    }
    for name, fact in KNOWN[script].items():
        kind, default, choices, nargs, required = have.pop(name)
        assert kind is {"int": int, "float": float, "str": str, None: bool}[fact.get("type")], name
        assert default == fact.get("default"), name
        assert nargs == fact.get("nargs"), name
        assert required == fact.get("required", False), name
        if "choices" in fact or name not in CHOICES_ADDED:
            assert sorted(choices or []) == sorted(fact.get("choices", [])), name
    ours = OURS | (OURS_FOR_ADAPTERS if "lora" in script else OURS_FOR_EVERY_WEIGHT)
    ours |= {} if "prior" in script or "flax" in script else OURS_FOR_PIXELS
    kandinsky = "prior" in script or "decoder" in script
    ours |= {} if kandinsky else OURS_FOR_SINGLE_FILES
    elsewhere = ELSEWHERE | (OURS_FOR_KANDINSKY if kandinsky else {})
    ours |= {name: elsewhere[name] for name in TAKEN_OVER[script]}
    if kandinsky:
        ours = {name: fact for name, fact in ours.items() if name not in NOT_FOR_KANDINSKY}
    left_out = NOT_IN_PRIOR if "prior" in script else NOT_IN_DECODER if "decoder" in script else set()
    ours = {name: fact for name, fact in ours.items() if name not in left_out}
    if "flax" in script:
        ours = {name: fact for name, fact in ours.items() if name not in NOT_IN_JAX}
    assert {name: (kind, default) for name, (kind, default, *_) in have.items()} == ours


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words", [["--help"], [*MINIMUM, "--learning_rat", "1e-4", "--max_train_step", "x"]])
def test_help_and_a_wrong_flag_answer_within_a_second(script, words):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1
    assert done.returncode == (0 if words == ["--help"] else 2)
    if words == ["--help"]:
        for heading in ("Base model:", "Data:", "Optimization:", "Checkpoints:", "Logs and the hub:"):
            assert heading in done.stdout
        for name in KNOWN[script]:
            assert f"--{name}" in done.stdout
    else:
        assert len(done.stderr.strip().splitlines()) == 1


def test_shared_modules_import_no_torch():
    rooms = (ROOT / "training_utils" / name for name in ("base", "cli", "data", "cache", "run"))
    paths = (path.relative_to(ROOT).with_suffix("") for room in rooms for path in room.rglob("*.py"))
    modules = ", ".join(".".join(path.parts) for path in paths)
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_start_imports_no_library_that_training_does_not_use():
    """bitsandbytes and scipy.stats cost seconds; what asks for 8 bits still finds its optimizer."""
    code = """
import sys, train_text_to_image_lora as script
from training_utils.torch_backend import lora
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
unet = UNet2DConditionModel(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=2)
lora.add_adapter(unet, lora.UNET_LAYERS, 2)
print([name for name in ("bitsandbytes", "scipy.stats", "deepspeed") if sys.modules.get(name)])
import bitsandbytes
print(bitsandbytes.optim.AdamW8bit.__name__)
"""
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
    assert said.split("\n")[:2] == ["[]", "AdamW8bit"]


def refusal(capsys, *words, script=train_text_to_image):
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as left:
        script.parse_args([*MINIMUM, *words])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


REFUSED = {
    "--resolution 65": "not a multiple of 8; the nearest is 64",
    "--train_batch_size 0": "at least 1",
    "--train_batch_size two": "'two' is not a whole number",
    "--learning_rate nan": "must be a number",
    "--learning_rate -1": "at least 0",
    "--snr_gamma 0": "above 0",
    "--caption_dropout 1.5": "from 0 to 1",
    "--validation_split 1": "from 0 to 0.9",
    "--checkpointing_steps -1": "at least 0",
    "--lr_scheduler cosin": "invalid choice",
    "--prediction_type v": "invalid choice",
    "--report_to tensorbord": "invalid choice",
    "--on_bad_sample ignore": "invalid choice",
    "--report_to dvclive": "pip install dvclive, or give --report_to none",
    "--max_train_step_count 3": "there is no flag --max_train_step_count; did you mean --max_train_steps",
    "--hub_tok hf_x": "there is no flag --hub_tok; did you mean --hub_token?",
    "--adam_beta2 1": "below 1",
    "--lr_scheduler polynomial --learning_rate 1e-7": "must be above it",
    "--min_bucket_reso 256": "--min_bucket_reso has no effect without --aspect_ratio_bucketing",
    "--bucket_reso_steps 64": "--bucket_reso_steps has no effect without",
    "--aspect_ratio_bucketing --min_bucket_reso 520": "--min_bucket_reso 520 is above --resolution 512",
    "--aspect_ratio_bucketing --max_bucket_reso 504": "--max_bucket_reso 504 is below --resolution 512",
    "--aspect_ratio_bucketing --bucket_reso_steps 60": "not a multiple of 8; the nearest is 64",
    "--aspect_ratio_bucketing --resolution 32": "--bucket_reso_steps 64 has no multiple from 16 to 32",
    "--aspect_ratio_bucketing --min_bucket_reso 500 --bucket_reso_steps 96": "has no multiple from 500 to 512",
    "--dream_training --input_perturbation 0.1": "use one of them",
    "--no_such_thing": "there is no flag --no_such_thing",
    "--no_use_emma": "there is no flag --no_use_emma; did you mean --no_use_ema?",
    "--dream_training --prediction_type v_prediction": "epsilon prediction only",
    "--use_8bit_adam": "pip install bitsandbytes",
    "--use_8bit_adam --optimizer adafactor": "contradicts",
    "--optimizer paged_adamw8bit": "pip install bitsandbytes",
    "--optimizer prodigy": "pip install prodigyopt",
    "--fused_backward_pass": "add --max_grad_norm 0",
    "--fused_backward_pass --max_grad_norm 0 --gradient_accumulation_steps 2": "leave one of them out",
    "--fused_backward_pass --max_grad_norm 0 --mixed_precision fp16": "use bf16 or no",
    "--full_bf16 --mixed_precision fp16": "contradicts --mixed_precision fp16",
    "--full_bf16 --mixed_precision no": "contradicts --mixed_precision no",
    "--enable_xformers_memory_efficient_attention": "pip install xformers",
    "--hub_private_repo": "--hub_private_repo has no effect without --push_to_hub",
    "--push_checkpoints": "--push_checkpoints has no effect without --push_to_hub",
    "--train_data_dir nowhere": "nowhere is not a folder",
    "--single_file_config x": "--single_file_config is for a model in one .safetensors file",
    "--train_data_config x.yaml": "--train_data_config names all datasets, and --train_data_dir another one",
    "--dataset_name x --repeats_from_folders": "--repeats_from_folders is for --train_data_dir alone",
    "--shuffle_buffer 100": "--shuffle_buffer has no effect without --streaming",
    "--streaming --repeats_from_folders": "a stream has no folders; leave it or --streaming out",
    "--streaming --aspect_ratio_bucketing": "which is to read them all; leave it or --streaming out",
    "--streaming --cache_latents": "--cache_latents keeps on the disk what is made of every image",
    "--streaming --cache_text_embeddings": "--cache_text_embeddings keeps on the disk what is made of every caption",
    "--streaming --shuffle_buffer 0": "at least 1",
    "--keep_tokens 1": "--keep_tokens has no effect without --shuffle_tags",
    "--shuffle_tags --cache_text_embeddings": "which --shuffle_tags changes",
    f"--output_dir {ROOT / 'README.md'}": "is a file",
    "--output_dir=": "--output_dir is empty; is a variable of the shell not set?",
    "--pretrained_model_name_or_path=": "--pretrained_model_name_or_path is empty",
    f"--output_dir {ROOT} --train_data_dir {ROOT}/tests/..": "are one folder",
    f"--output_dir {ROOT} --pretrained_model_name_or_path {ROOT}": "would write over the model that it begins with",
    "--use_ema true": "'true' belongs to no flag: one that is on or off takes no value",
    "--enable_bucket": "there is no flag --enable_bucket; here it is --aspect_ratio_bucketing",
    "--network_dim 8": "there is no flag --network_dim here; in others of these scripts it is --rank (",
    "--rank 8": "there is no flag --rank here, only in others of these scripts (",
    "--validation_prompt x": "only in others of these scripts; did you mean --validation_prompts?",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_command_line_gets_its_sentence(words, capsys, monkeypatch):
    missing = {"bitsandbytes", "prodigyopt", "xformers", "dvclive"}
    monkeypatch.setattr(packages, "is_missing", lambda package: package in missing)
    assert REFUSED[words] in refusal(capsys, *words.split())


@pytest.mark.parametrize("flag", ["--full_bf16", "--fused_backward_pass --max_grad_norm 0"])
def test_prodigy_does_not_update_weights_one_by_one(flag, capsys, monkeypatch):
    monkeypatch.setattr(packages, "is_missing", lambda package: False)
    assert "one step size for all weights" in refusal(capsys, "--optimizer", "prodigy", *flag.split())
    assert "above 0" in refusal(capsys, "--optimizer", "prodigy", "--learning_rate", "0")


def test_an_optimizer_is_one_row(monkeypatch):
    """Its name is taken, its package asked for, what does not go with it refused, and it is built."""
    row = optimizers.Optimizer(
        "sgd",
        help="is plain",
        built_by="torch.optim:SGD",
        takes=("weight_decay",),
        fixed={"momentum": 0.5},
        package=packages.Package("some_package", pip="some-package==1", title="some package"),
        not_with={"use_ema": "does not go with --{flag}"},
    )
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", row)
    monkeypatch.setattr(packages, "is_missing", lambda name: False)
    args = train_text_to_image.parse_args([*MINIMUM, "--optimizer", "sgd", "--learning_rate", "0.1"])
    weight = torch.nn.Parameter(torch.ones(2))
    made = make_optimizer([weight], args.optimization, learning_rate=args.learning_rate)
    (group,) = made.param_groups
    assert type(made) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.5, 0.01)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("loss_scaling", [False, True])
def test_every_row_builds_its_optimizer(name, loss_scaling):
    row = optimizers.OPTIMIZERS[name]
    if row.package is not None:
        pytest.importorskip(row.package.name)
    options = OptimizerOptions(name=name, betas=(0.8, 0.9), weight_decay=0.5, epsilon=1e-5)
    made = make_optimizer(
        [torch.nn.Parameter(torch.ones(2, 2))], options, learning_rate=0.25, loss_scaling=loss_scaling
    )
    (group,) = made.param_groups
    expected = {"lr": 0.25, "betas": (0.8, 0.9), "weight_decay": 0.5, "eps": 1e-5}
    assert type(made).__name__ == row.built_by.split(":")[1]
    for setting in ("lr", *row.takes):
        assert group[setting] == expected[setting]
    for setting, value in row.fixed.items():
        assert group[setting] == value
    assert group.get("fused", False) == (row.has_fused_kernel and not loss_scaling) or not row.has_fused_kernel
    assert not row.found_settings or row.found_settings & group.keys()  # some of them after the first step
    assert all(flag in table.flags_of("train_text_to_image") for flag in (*row.not_with, *row.above_zero))


def test_the_table_is_the_only_list_of_flags():
    """No other module has a list, set, tuple or dict with three or more names of flags in it.

    data/mixture.py has the keys of a file of its own, some named like flags.
    """
    flags = table.names(lambda flag: "_" in flag.name)  # one word, such as seed, may mean anything
    for path in [*ROOT.glob("train_*.py"), *ROOT.glob("training_utils/**/*.py"), *ROOT.glob("tools/*.py")]:
        if path.parent.name == "table" or path.name == "mixture.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            items = getattr(node, "elts", None) or getattr(node, "keys", None) or []
            if not isinstance(items, list):
                continue
            strings = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                strings = node.value.split()
            assert len(flags & set(strings)) < 3, f"{path}, line {node.lineno}: {strings}"


def test_what_rows_say_of_other_flags_exists():
    everywhere = table.names(lambda flag: True)
    for flag in table.rows():
        mentioned = {*flag.replaces, *(flag.needs.flags if flag.needs else ())}
        assert mentioned <= everywhere, flag.name


REFUSED_SDXL = {
    "--timestep_bias_multiplier 0": "above 0",
    "--timestep_bias_portion 2": "from 0 to 1",
    "--timestep_bias_begin -1": "at least 0",
    "--timestep_bias_strategy range --timestep_bias_begin 9 --timestep_bias_end 9": "is not below its end, 9",
    "--timestep_bias_strategy sooner": "invalid choice",
    "--proportion_empty_prompts 0.1 --caption_dropout 0.2": "mean the same",
    "--enable_npu_flash_attention": "pip install torch_npu",
    "--lora_alpha 0": "above 0",
    "--rank 0": "at least 1",
    "--use_dora --save_kohya_format": "no agreed place for what --use_dora learns",
}


@pytest.mark.parametrize("words", REFUSED_SDXL)
def test_a_wrong_command_line_for_sdxl_adapters_gets_its_sentence(words, capsys):
    assert REFUSED_SDXL[words] in refusal(capsys, *words.split(), script=train_text_to_image_lora_sdxl)


def test_a_bias_without_a_multiplier_is_told():
    words = [*MINIMUM, "--train_data_dir", "tests", "--timestep_bias_strategy", "later"]
    parse = train_text_to_image_lora_sdxl.parse_args
    assert "draws all timesteps alike" in parse(words).notices[0]
    assert (
        "has no effect without --timestep_bias_strategy range"
        in parse([*words, "--timestep_bias_end", "9"]).notices[0]
    )
    assert not parse([*words, "--timestep_bias_multiplier", "2"]).notices


REFUSED_IN_JAX = {
    "--report_to comet_ml": "invalid choice: 'comet_ml'",
    "--report_to wandb": "pip install wandb, or give --report_to none",
    "--use_8bit_adam": "there is no flag --use_8bit_adam",
    "--dream_training": "there is no flag --dream_training here, only in others of these scripts (",
    "--mixed_precision fp8": "invalid choice",
    "--resolution 65": "not a multiple of 8; the nearest is 64",
}


@pytest.mark.parametrize("words", REFUSED_IN_JAX)
def test_a_wrong_command_line_for_jax_gets_its_sentence(words, capsys, monkeypatch):
    monkeypatch.setattr(packages, "is_missing", lambda package: package == "wandb")
    assert REFUSED_IN_JAX[words] in refusal(capsys, *words.split(), script=train_text_to_image_flax)


TOLD = {
    "--lr_scheduler cosine --max_train_steps 500": "500 leaves nothing after the warm-up in 500 steps",
    "--lr_warmup_steps 3": "--lr_scheduler constant has no warm-up",
    "--validation_steps 5": "--validation_steps has no effect without a validation prompt",
    f"--train_data_dir {ROOT} --output_dir {ROOT}/out": "lies in --train_data_dir",
    "--optimizer prodigy": "it is made for --learning_rate 1",
    "--ema_decay 0.999": "--ema_decay has no effect without --use_ema",
    "--lr_num_cycles 3": "--lr_num_cycles has no effect without --lr_scheduler cosine_with_restarts",
    "--ema_decay 0.9999": None,  # the default, as run.yaml has it
    "--lr_scheduler cosine --max_train_steps 501": None,
    "--validation_steps 5 --validation_split 0.1": None,
    "--output_dir tests_out --resume_from_checkpoint=": None,
}


@pytest.mark.parametrize("words", TOLD)
def test_what_is_surely_not_meant_is_told(words, monkeypatch):
    monkeypatch.setattr(packages, "is_missing", lambda package: False)
    notices = train_text_to_image.parse_args([*MINIMUM, "--train_data_dir", "tests", *words.split()]).notices
    assert TOLD[words] in notices[0] if TOLD[words] else not notices


def test_kohyas_flags_are_called_what_the_docs_say():
    page = (ROOT / "docs/from_the_originals.md").read_text().split("| kohya's flag")[1].split("\n\n")[0]
    options = (ROOT / "docs/options.md").read_text()
    found = 0
    for flag in table.rows():
        for entry in flag.other_names:
            theirs = entry.partition(" ")[0]
            for line in page.splitlines():
                if re.search(rf"`--{theirs}[ `]", line.split(" | ")[0]):
                    assert f"`--{flag.name}" in line and f"| `--{flag.name}` |" in options, line
                    found += 1
    assert found > 20


def test_adapters_may_lie_beside_their_base_model():
    words = ["--output_dir", str(ROOT), "--pretrained_model_name_or_path", str(ROOT), "--train_data_dir", "tests"]
    train_text_to_image_lora_sdxl.parse_args(words)


def test_no_data_at_all(capsys):
    with pytest.raises(SystemExit) as left:
        train_text_to_image.parse_args(["--pretrained_model_name_or_path", "model"])
    assert left.value.code == 2
    assert "give --train_data_dir" in capsys.readouterr().err


def test_secrets_leave_the_command_line():
    words = ["--seed", "1", "--hub_token", "hf_x", "--use_ema", "--hub_token=hf_y", "--push_to_hub"]
    assert cli.without_secrets(words) == ["--seed", "1", "--use_ema", "--push_to_hub"]


def test_xformers_without_a_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "is_missing", lambda package: False)
    sentence, code = run.fails(tmp_path, "--enable_xformers_memory_efficient_attention")
    assert "needs a CUDA GPU" in sentence and code == 2


def test_fp16_without_a_gpu(run, tmp_path):
    sentence, code = run.fails(tmp_path, "--mixed_precision", "fp16")
    assert "--mixed_precision fp16 does not run on this device" in sentence and code == 2
