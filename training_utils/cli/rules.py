"""What is wrong with flags that are each right by themselves. A rule returns a sentence, or None."""

import os
from collections.abc import Callable

from training_utils.cli import packages, table
from training_utils.cli.arguments import Arguments
from training_utils.cli.launch_rules import launch_problem
from training_utils.cli.optimizers import OPTIMIZERS


def contradiction(args: Arguments) -> str | None:
    """The first thing that is wrong with the flags of a run, as a sentence, or None."""
    for rule in RULES:
        problem = rule(args)
        if problem is not None:
            return problem
    return None


def crops_at_random(args: Arguments) -> bool:
    """Whether the training images are cropped at a drawn place; the decoders and the others ask in opposite ways."""
    return args.get("random_crop", not args.get("center_crop", True))


def _empty_name(args: Arguments) -> str | None:
    for name, value in vars(args).items():
        if value == "" and (name == "output_dir" or name.endswith("_name_or_path")):
            return f"--{name} is empty; is a variable of the shell not set?"
    return None


def _output_folder(args: Arguments) -> str | None:
    out = args.output_dir
    if out and os.path.exists(out) and not os.path.isdir(out):
        return f"--output_dir {out} is a file"
    read = ["train_data_dir"]
    # Adapters may lie beside their model; adapters with a changed sampler may not, nor may another model.
    if args.script.trains == "weights" or args.schedule_changes:
        read += [name for name in vars(args) if name.endswith("model_name_or_path")]
    for name in sorted(read):
        folder = args.get(name)
        if out and folder and os.path.realpath(folder) == os.path.realpath(out):
            what = "its own data" if name == "train_data_dir" else "the model that it begins with"
            return f"--output_dir and --{name} are one folder, {folder}: the run would write over {what}"
    return None


def _data_source(args: Arguments) -> str | None:
    if args.train_data_config is not None:
        other = min(args.given & {"train_data_dir", "dataset_name"}, default=None)
        if other:
            return f"--train_data_config names all datasets, and --{other} another one; give one of them"
        if not os.path.isfile(args.train_data_config):
            return f"--train_data_config {args.train_data_config} is not a file"
    elif args.dataset_name is None and args.train_data_dir is None:
        return "give --train_data_dir (a folder of images), --dataset_name or --train_data_config"
    elif args.dataset_name is None and not os.path.isdir(args.train_data_dir):
        return f"--train_data_dir {args.train_data_dir} is not a folder"
    if args.repeats_from_folders and (args.dataset_name is not None or args.train_data_config is not None):
        return (
            "--repeats_from_folders is for --train_data_dir alone; in --train_data_config each source has its repeats"
        )
    return None


def _needs(args: Arguments) -> str | None:
    """A flag without what it needs, where that is an error."""
    for name, flag in table.flags_of(args.script.name).items():
        need = flag.needs
        if need is None or not need.refused or need.are_met(vars(args)):
            continue
        if name in args.given and (need.even_default or args.get(name) != flag.default):
            return f"--{name} has no effect without {need.sentence}; give both or neither"
    return None


def _streaming(args: Arguments) -> str | None:
    if args.streaming:
        for name, flag in table.flags_of(args.script.name).items():
            if flag.not_streamed is not None and args.get(name):
                return f"--{name} {flag.not_streamed}; leave it or --streaming out"
    return None


def _buckets(args: Arguments) -> str | None:
    limits = args.buckets
    if limits is None:
        return None
    side = limits.resolution
    if limits.smallest > side:
        return f"--min_bucket_reso {limits.smallest} is above --resolution {side}, about the side of the square shape"
    if limits.largest < side:
        return f"--max_bucket_reso {limits.largest} is below --resolution {side}, about the side of the square shape"
    if side // limits.step * limits.step < limits.smallest:
        return (
            f"--bucket_reso_steps {limits.step} has no multiple from {limits.smallest} to {side}, as the square shape "
            "needs one"
        )
    return None


def _captions(args: Arguments) -> str | None:
    if args.get("shuffle_tags") and args.get("cache_text_embeddings"):
        return "--cache_text_embeddings keeps what the text encoders make of a caption, which --shuffle_tags changes"
    if args.get("cache_text_embeddings") and args.get("train_text_encoder"):
        return "--cache_text_embeddings keeps what the text encoders make, which --train_text_encoder changes"
    if args.get("proportion_empty_prompts") and args.caption_dropout not in (0, args.proportion_empty_prompts):
        return "--proportion_empty_prompts and --caption_dropout mean the same; give one of them"
    return None


def _single_file(args: Arguments) -> str | None:
    if args.get("single_file_config") is None:
        return None
    if not os.path.isfile(args.pretrained_model_name_or_path or ""):
        return "--single_file_config is for a model in one .safetensors file, which this one is not"
    if not os.path.isdir(args.single_file_config):
        return f"--single_file_config {args.single_file_config} is not a folder"
    return None


def _objective(args: Arguments) -> str | None:
    if args.get("dream_training") and args.input_perturbation:
        return "--dream_training and --input_perturbation both shift the input against the target; use one of them"
    if args.get("dream_training") and args.prediction_type == "v_prediction":
        return "--dream_training is defined for epsilon prediction only"
    if args.get("timestep_bias_strategy") == "range" and args.timestep_bias_begin >= args.timestep_bias_end:
        return f"--timestep_bias_begin {args.timestep_bias_begin} is not below its end, {args.timestep_bias_end}"
    return None


def _optimizer(args: Arguments) -> str | None:
    name = args.get("optimizer")
    if name is None:
        return None
    if args.use_8bit_adam:
        if "optimizer" in args.given and name != "adamw8bit":
            return f"--use_8bit_adam contradicts --optimizer {name}"
        name = "adamw8bit"
    row = OPTIMIZERS[name]
    if row.package is not None and packages.is_missing(row.package.name):
        return f"--optimizer {name} needs {row.package.title}: pip install {row.package.pip}"
    for flag in row.above_zero:
        if not args.get(flag):
            return f"--optimizer {name} needs a --{flag} above 0"
    for flag, why in row.not_with.items():
        if args.get(flag):
            return f"--optimizer {name} {why.format(flag=flag)}"
    return None


def _learning_rate(args: Arguments) -> str | None:
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        return f"--lr_scheduler polynomial ends at 1e-7, so --learning_rate {args.learning_rate} must be above it"
    return None


def _less_memory(args: Arguments) -> str | None:
    if args.get("fused_backward_pass"):
        if args.max_grad_norm:
            return (
                "--fused_backward_pass updates weights before the norm of the whole gradient is known, so it cannot "
                "be clipped to it; add --max_grad_norm 0"
            )
        if args.gradient_accumulation_steps > 1:
            return (
                "--fused_backward_pass frees each gradient at once, and --gradient_accumulation_steps would need it; "
                "leave one of them out"
            )
        if args.mixed_precision == "fp16":
            return "--fused_backward_pass frees gradients that fp16 would scale back first; use bf16 or no"
    if args.get("full_bf16") and args.mixed_precision in ("no", "fp16"):
        return f"--full_bf16 computes in bfloat16, and contradicts --mixed_precision {args.mixed_precision}"
    return None


def _packages(args: Arguments) -> str | None:
    for name, flag in table.flags_of(args.script.name).items():
        if flag.package is not None and args.get(name) and packages.is_missing(flag.package.name):
            return f"--{name} needs {flag.package.title}: pip install {flag.package.pip}"
    tracker = args.report_to
    if tracker not in ("all", "none") and packages.is_missing(tracker):
        return f"--report_to {tracker} needs {tracker}: pip install {tracker}, or give --report_to none"
    return None


def _crops(args: Arguments) -> str | None:
    if "cached_crops" in args.given and not crops_at_random(args):
        return "--cached_crops is for --cache_latents with random crops"
    return None


def _adapters(args: Arguments) -> str | None:
    if args.get("use_dora") and args.get("save_kohya_format"):
        return "--save_kohya_format has no agreed place for what --use_dora learns; leave one of them out"
    return None


RULES: tuple[Callable[[Arguments], str | None], ...] = (
    _empty_name,
    _output_folder,
    _data_source,
    _needs,
    _streaming,
    _buckets,
    launch_problem,
    _single_file,
    _objective,
    _optimizer,
    _less_memory,
    _captions,
    _learning_rate,
    _crops,
    _adapters,
    _packages,
)
