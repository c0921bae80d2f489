"""The command line: one line a flag, in groups that `--help` shows.

This module imports the standard library alone, so that `--help` and a wrong flag are answered at once. Each script
passes the groups it wants to `parse`; a flag that only one script has is added in that script.
"""

import argparse
import difflib
import importlib.util
import json
import os
import sys
from typing import Any, NamedTuple

from training_utils.base import launch
from training_utils.cli import run_file


class Flag(NamedTuple):
    """One command-line option. `kind` turns the text into a value and raises ArgumentTypeError with a sentence."""

    name: str
    kind: Any = str
    default: Any = None
    help: str = ""
    choices: tuple | None = None
    nargs: str | None = None
    required: bool = False


def _bounded(convert, low, high, what):
    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high or value == float("inf"):  # also refuses nan
            bounds = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}, not {text}")
        return value

    parse.kind = convert
    return parse


def whole(low=0, high=float("inf")):
    """A parser for an integer from `low` to `high`."""
    return _bounded(int, low, high, "a whole number")


def number(low=0.0, high=float("inf")):
    """A parser for a float from `low` to `high`."""
    return _bounded(float, low, high, "a number")


def above_zero(text):
    """A float above 0."""
    value = number()(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


above_zero.kind = float


def below_one(text):
    """A float from 0 to just below 1."""
    value = number(0, 1)(text)
    if value == 1:
        raise argparse.ArgumentTypeError("must be below 1")
    return value


below_one.kind = float


def multiple_of_8(text):
    """A whole number of pixels that is a multiple of 8, as the autoencoders need it."""
    value = whole(8)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 8; the nearest is {round(value / 8) * 8}")
    return value


multiple_of_8.kind = int


def without(group, *names):
    """The flags of a group, (title, [Flag]), but for those of these names: a list."""
    return [flag for flag in group[1] if flag.name not in names]


SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio all none".split()
INTERPOLATIONS = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]

# fmt: off
MODEL = ("Base model", [
    Flag("pretrained_model_name_or_path", help="folder or hub id of the model to start from", required=True),
    Flag("revision", help="branch, tag or commit of a hub model; pin one so that no later upload changes the run"),
    Flag("variant", help="which stored copy of the weights to read, for example fp16"),
    Flag("cache_dir", help="where downloads are kept; set it when the home folder is small"),
])
SINGLE_FILE_CONFIG = Flag("single_file_config", help="where the model is one .safetensors file: folder of a model of "
                          "the same kind, whose settings are taken; left out, they are fetched from the hub")
KANDINSKY = ("Base model", [
    Flag("pretrained_prior_model_name_or_path", str, "kandinsky-community/kandinsky-2-2-prior",
         "folder or hub id of the prior, which turns text into the embedding of an image, with CLIP's encoders"),
    Flag("pretrained_decoder_model_name_or_path", str, "kandinsky-community/kandinsky-2-2-decoder",
         "folder or hub id of the decoder, which turns such an embedding into the image"),
    Flag("prior_revision", help="branch, tag or commit of a prior on the hub; pin one so that no later upload changes "
         "the run"),
    Flag("decoder_revision", help="branch, tag or commit of a decoder on the hub"),
    *without(MODEL, "pretrained_model_name_or_path", "revision"),
])
DATA = ("Data", [
    Flag("dataset_name", help="hub id or local path that the datasets library can load"),
    Flag("dataset_config_name", help="configuration of that dataset, where it has several"),
    Flag("train_data_dir", help="folder of images with metadata.jsonl, .csv or .parquet or a .txt caption beside "
         "each, of WebDataset's .tar shards, or of .parquet tables; with --dataset_name it is passed on as data_dir"),
    Flag("streaming", bool, False, "read .tar shards or .parquet tables where they lie, on the hub or in "
         "--train_data_dir, a few chunks at a time; for datasets that do not fit the disk"),
    Flag("shuffle_buffer", whole(1), 10_000, "with --streaming: samples that are shuffled together; more are better "
         "mixed and take more room on the disk"),
    Flag("train_data_config", help="YAML file that names several datasets, repeated or weighted"),
    Flag("repeats_from_folders", bool, False, "show the images in folders named like `10_sks dog` so many times an "
         "epoch (kohya's layout); images without a caption there get these words"),
    Flag("image_column", str, "image", "column that holds the images"),
    Flag("caption_column", str, "text", "column that holds the captions: a string, or a list to draw one from"),
    Flag("shuffle_tags", bool, False, "put a caption's tags, which commas separate, into a drawn order each time"),
    Flag("keep_tokens", whole(0), 0, "with --shuffle_tags: the first so many tags stay where they are"),
    Flag("max_train_samples", whole(1), None, "train on this many images only, for a quick trial"),
    Flag("resolution", multiple_of_8, 512, "side of the square training image in pixels, a multiple of 8"),
    Flag("center_crop", bool, False, "always take the middle of the image instead of a random crop"),
    Flag("random_flip", bool, False, "mirror every second image; not for text or faces with a parting"),
    Flag("image_interpolation_mode", str, "lanczos", "filter that resizes the images", INTERPOLATIONS),
    Flag("caption_dropout", number(0, 1), 0.0, "share of samples whose caption is left empty, drawn anew each epoch; "
         "0.1 keeps classifier-free guidance working in long runs"),
    Flag("dataloader_num_workers", whole(0), 0, "processes that read images ahead; 0 reads in the training process"),
    Flag("on_bad_sample", str, "error", "what a caption or image that cannot be used does: stop the run, or have it "
         "left out with a warning", ("error", "skip")),
    Flag("check_data", bool, False, "only look at every caption and image and print a report; needs no model"),
])
OF_CAPTIONS = ("caption_column", "caption_dropout", "shuffle_tags", "keep_tokens")  # flags of DATA
BUCKETS = ("Aspect ratios", [
    Flag("aspect_ratio_bucketing", bool, False, "train on images of many shapes, each about --resolution^2 pixels, "
         "instead of cutting all to squares; a batch holds images of one shape"),
    Flag("min_bucket_reso", whole(8), None, "shortest side of a shape in pixels; left out, half of --resolution"),
    Flag("max_bucket_reso", whole(8), None, "longest side of a shape in pixels; left out, twice --resolution"),
    Flag("bucket_reso_steps", multiple_of_8, 64, "sides are multiples of this many pixels, itself a multiple of 8; "
         "smaller ones crop less and make more shapes, whose batches fill less well"),
])
TRAINING = ("Training", [
    Flag("config", help="file of flags, such as the run.yaml of an earlier run; flags beside it win, and --no_NAME "
         "takes back one that is true in it"),
    Flag("dry_run", bool, False, "make a few steps, write nothing, and tell what would be trained, in how much "
         "memory and how long"),
    Flag("output_dir", str, None, "folder for the result, the checkpoints, the logs and the validation images"),
    Flag("seed", whole(0, 2**62), None, "every draw of the run comes from it; left out, one is drawn and printed"),
    Flag("train_batch_size", whole(1), 16, "images per process and micro-step; lower it when memory runs out"),
    Flag("gradient_accumulation_steps", whole(1), 1, "micro-steps per step: a larger batch without more memory"),
    Flag("num_train_epochs", whole(1), 100, "skips the data"),
    Flag("max_train_steps", whole(1), None, "optimizer steps to make; overrides --num_train_epochs"),
])
OPTIMIZATION = ("Optimization", [
    Flag("learning_rate", number(), 1e-4, "peak learning rate, before --scale_lr"),
    Flag("scale_lr", bool, False, "multiply the learning rate by accumulation steps x batch size x processes"),
    Flag("lr_scheduler", str, "constant", "shape of the learning rate over the run", SCHEDULES),
    Flag("lr_warmup_steps", whole(0), 500, "steps until the peak is reached; `constant` has no warm-up"),
    Flag("lr_num_cycles", whole(1), 1, "hard restarts of cosine_with_restarts"),
    Flag("lr_power", number(), 1.0, "exponent of the polynomial schedule"),
    Flag("optimizer", str, "adamw", "adamw8bit and adafactor keep less state in memory; paged_adamw8bit moves it to "
         "host memory when the GPU's runs out; prodigy finds its own step size, with --learning_rate 1",
         ("adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy")),
    Flag("use_8bit_adam", bool, False, "the same as --optimizer adamw8bit"),
    Flag("adam_beta1", below_one, 0.9, "decay of Adam's mean of the gradient"),
    Flag("adam_beta2", below_one, 0.999, "decay of Adam's mean of the squared gradient"),
    Flag("adam_weight_decay", number(), 1e-2, "decoupled weight decay"),
    Flag("adam_epsilon", number(), 1e-8, "added to Adam's denominator"),
    Flag("max_grad_norm", number(), 1.0, "clip the gradient to this norm; 0 means no clipping"),
    Flag("on_nan", str, "stop", "when the loss or gradient is not finite: stop and keep the last good state, or skip "
         "that step", ("stop", "skip")),
])
SNR_GAMMA = Flag("snr_gamma", above_zero, None, "min-SNR loss weighting (arXiv 2303.09556); 5.0 is the paper's value")
NOISE_OFFSET = Flag("noise_offset", number(), 0.0,
                    "shift of each channel's noise; 0.1 lets images be darker or brighter")
OBJECTIVE = ("Objective", [
    Flag("prediction_type", str, None, "what the network predicts; left out, what the model's own scheduler says",
         ("epsilon", "v_prediction")),
    SNR_GAMMA,
    NOISE_OFFSET,
    Flag("rescale_betas_zero_snr", bool, False, "train on a schedule that ends in pure noise (arXiv 2305.08891); "
         "goes with --prediction_type v_prediction"),
])
RECTIFICATION = [
    Flag("input_perturbation", number(), 0.0, "noise in the input but not in the target (arXiv 2301.11706); try 0.1"),
    Flag("dream_training", bool, False, "DREAM (arXiv 2312.00210): one more forward pass a step, sharper detail"),
    Flag("dream_detail_preservation", number(), 1.0, "DREAM's exponent p; larger keeps more detail"),
]
TIMESTEP_BIAS = [
    Flag("timestep_bias_strategy", str, "none", "timesteps to draw more often", ("earlier", "later", "range", "none")),
    Flag("timestep_bias_multiplier", above_zero, 1.0, "how many times as often; below 1: less often"),
    Flag("timestep_bias_begin", whole(0), 0, "first timestep of `range`"),
    Flag("timestep_bias_end", whole(1), 1000, "timestep after the last one of `range`"),
    Flag("timestep_bias_portion", number(0, 1), 0.25, "share of the timesteps that `earlier` and `later` mean"),
]
SDXL = [
    Flag("pretrained_vae_model_name_or_path", help="another VAE; one that is safe in half precision saves time and "
         "memory, for example madebyollin/sdxl-vae-fp16-fix"),
    Flag("proportion_empty_prompts", number(0, 1), 0.0, "another name of --caption_dropout"),
    Flag("enable_npu_flash_attention", bool, False, "flash attention on Ascend NPUs"),
]
EMA = ("EMA weights", [
    Flag("use_ema", bool, False, "keep an exponential moving average of the weights, and save that"),
    Flag("ema_decay", number(0, 1), 0.9999, "upper bound of the EMA decay; lower it for runs below 10,000 steps"),
    Flag("offload_ema", bool, False, "keep the EMA weights in host memory; saves a model's size, costs a copy a step"),
    Flag("foreach_ema", bool, False, "accepted for old command lines: multi-tensor EMA steps are always on"),
])
VALIDATION = ("Validation", [
    Flag("validation_epochs", whole(0), 5, "validate every so many epochs; 0 means never"),
    Flag("validation_steps", whole(0), None, "validate every so many steps instead"),
    Flag("validation_at_start", bool, False, "validate before the first step too, to see what the model did before"),
    Flag("validation_num_inference_steps", whole(1), 20, "sampler steps of a validation image"),
    Flag("validation_guidance_scale", number(), 7.5, "guidance scale of the validation images; 1 or less means off"),
    Flag("validation_split", number(0, 0.9), 0.0, "share of the images held out for val_loss"),
])
LORA = ("Adapters", [
    Flag("rank", whole(1), 4, "rank of the adapters: their size, and how much they can learn"),
    Flag("lora_alpha", above_zero, None, "scale of the adapters' term; left out, the rank"),
    Flag("lora_dropout", number(0, 1), 0.0, "dropout on the adapters' input"),
    Flag("use_dora", bool, False, "learn the norms of the weights' columns too (DoRA, arXiv 2402.09353)"),
    Flag("train_text_encoder", bool, False, "adapters in the text encoder as well, for words that it does not know"),
    Flag("save_kohya_format", bool, False, "also write the file that WebUI and ComfyUI read"),
])
VALIDATION_PROMPT = [
    Flag("validation_prompt", str, None, "draw images for this prompt"),
    Flag("num_validation_images", whole(0), 4, "how many; 0 means none"),
]
VALIDATION_PROMPTS = Flag("validation_prompts", str, None, "draw one image for each of these prompts", nargs="+")
CHECKPOINTS = ("Checkpoints", [
    Flag("checkpointing_steps", whole(0), 500, "steps between checkpoints; one is written at the end too; 0: never"),
    Flag("checkpoints_total_limit", whole(1), None, "keep this many checkpoints; the oldest go once a new one stands"),
    Flag("resume_from_checkpoint", help="`latest`, a checkpoint's name in --output_dir, or a path"),
])
HARDWARE = ("Speed and memory", [
    Flag("mixed_precision", str, None, "precision of the computation; left out, what accelerate is configured for",
         ("no", "fp16", "bf16")),
    Flag("gradient_checkpointing", bool, False, "recompute activations: much less memory, about a third slower"),
    Flag("allow_tf32", bool, False, "TF32 matrix products on Ampere and later GPUs: faster, slightly less exact"),
    Flag("enable_xformers_memory_efficient_attention", bool, False, "attention by xFormers; for GPUs without a fast "
         "built-in attention"),
    Flag("process_group_timeout", whole(1), 1800, "seconds that processes wait for each other before they give up"),
    Flag("local_rank", int, -1, "set by old launchers; leave it alone"),
])
CACHES = ("Caches: frozen networks run once", [
    Flag("cache_latents", bool, False, "let the networks that see images run once for each image and keep on disk "
         "what they make of it, for this run and later ones"),
    Flag("cached_crops", whole(1), 1, "how many random crops of each image to keep; every epoch takes one of them"),
    Flag("cache_text_embeddings", bool, False, "the same for the text encoders and captions"),
    Flag("encoding_cache_dir", help="folder for both; left out, one beside the downloads"),
])
LESS_MEMORY = [
    Flag("fused_backward_pass", bool, False, "update each weight during the backward pass and free its gradient: "
         "saves the gradients' memory; needs --max_grad_norm 0"),
    Flag("full_bf16", bool, False, "weights, gradients and optimizer state in bfloat16, rounded stochastically: half "
         "their memory, slightly less exact"),
]
KANDINSKY_DEFAULTS = {"train_batch_size": 1, "adam_weight_decay": 0.0, "validation_guidance_scale": 4.0}
KANDINSKY_RESOLUTION = Flag("resolution", whole(1), 512, "side of the validation images, which the decoder rounds "
                            "up to a multiple of 64; CLIP's image processor sizes the training images")
KANDINSKY_DECODER = [
    Flag("train_data_dir", help="folder of images; captions are neither needed nor read; with --dataset_name it is "
         "passed on as data_dir"),
    Flag("random_crop", bool, False, "train on a random square of each image instead of its middle"),
    Flag("reducing_gap", number(1), 1.0, "how exactly large images are made smaller: 1 is quickest, 3 hardly "
         "differs from exact"),
    Flag("caption_dropout", number(0, 1), 0.0, "share of samples that are conditioned on no image, drawn anew each "
         "epoch; 0.1 keeps classifier-free guidance working in long runs"),
]
REPORTING = ("Logs and the hub", [
    Flag("report_to", str, "tensorboard", "where the curves go; `all`: every tracker that is installed", TRACKERS),
    Flag("logging_dir", str, "logs", "folder for the trackers' files, inside --output_dir"),
    Flag("logging_steps", whole(1), 10, "steps between two looks at the losses; every step is still logged"),
    Flag("tracker_project_name", str, "text2image-fine-tune", "the project's name in the tracker"),
    Flag("push_to_hub", bool, False, "upload the result when it stands"),
    Flag("hub_token", help="token for the upload; `hf auth login` keeps it out of the shell history and the list "
         "of processes"),
    Flag("hub_model_id", help="repository to upload to; left out, the name of --output_dir"),
    Flag("hub_private_repo", bool, False, "create the repository as a private one"),
    Flag("push_checkpoints", bool, False, "upload each checkpoint too, in the background, to the repository's branch "
         "`checkpoints`"),
])
# fmt: on

# The flags that decide what the weights become; a checkpoint remembers them and a resumed run compares.
MATHEMATICS = frozenset(
    """
    pretrained_model_name_or_path revision variant non_ema_revision dataset_name dataset_config_name max_train_samples
    resolution center_crop random_flip image_interpolation_mode caption_dropout train_batch_size
    gradient_accumulation_steps num_train_epochs max_train_steps learning_rate scale_lr lr_scheduler lr_warmup_steps
    lr_num_cycles lr_power optimizer adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    prediction_type snr_gamma noise_offset input_perturbation rescale_betas_zero_snr dream_training
    dream_detail_preservation use_ema ema_decay validation_split mixed_precision rank lora_alpha lora_dropout use_dora
    train_text_encoder pretrained_vae_model_name_or_path proportion_empty_prompts timestep_bias_strategy
    timestep_bias_multiplier timestep_bias_begin timestep_bias_end timestep_bias_portion
    pretrained_prior_model_name_or_path pretrained_decoder_model_name_or_path prior_revision decoder_revision
    random_crop reducing_gap cached_crops aspect_ratio_bucketing min_bucket_reso max_bucket_reso bucket_reso_steps
    full_bf16 repeats_from_folders shuffle_tags keep_tokens streaming shuffle_buffer
    """.split()
)
NOT_STREAMED = {
    "train_data_config": "names several datasets, and --streaming reads one",
    "repeats_from_folders": "shows the images of some folders again, of which a stream has none",
    "aspect_ratio_bucketing": "needs the size of every image before the first step, which is to read them all",
    "cache_latents": "keeps on the disk what is made of every image, and --streaming is for sets too large for it",
    "cache_text_embeddings": "keeps on the disk what is made of every caption, after reading them all",
}
SECRETS = frozenset(["hub_token"])
ONCE = frozenset("config check_data dry_run resume_from_checkpoint local_rank".split())  # not in run.yaml
NOT_IN_A_FILE = {
    "config": "cannot stand in such a file",
    "hub_token": "is a secret and a file is read by others; use `hf auth login`, or give it on the command line",
}
HANDED_ON = "TRAINING_HUB_TOKEN"  # the environment variable in which `hide_secrets` hands the token on


def suggestion(word, known, quote="", cutoff=0.6):
    """What to add to the sentence that a word is not known: the nearest of those that are, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else ""


# What kohya's flags are called here; a test holds docs/from_the_originals.md against it.
KOHYA = {
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "network_dropout": "lora_dropout",
    "enable_bucket": "aspect_ratio_bucketing",
    "shuffle_caption": "shuffle_tags",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "random_flip",
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs_to_disk": "cache_text_embeddings",
    "min_snr_gamma": "snr_gamma",
    "v_parameterization": "prediction_type",
    "zero_terminal_snr": "rescale_betas_zero_snr",
    "optimizer_type": "optimizer",
    "save_every_n_steps": "checkpointing_steps",
    "save_state": "checkpointing_steps",
    "resume": "resume_from_checkpoint",
    "sample_prompts": "validation_prompt",
    "sample_every_n_steps": "validation_steps",
    "sample_at_first": "validation_at_start",
    "max_train_epochs": "num_train_epochs",
    "xformers": "enable_xformers_memory_efficient_attention",
    "vae": "pretrained_vae_model_name_or_path",
}


def _known_somewhere():
    """The names of the flags above, of which each script has some."""

    def names(value):
        if isinstance(value, Flag):
            return {value.name}
        return set().union(*map(names, value)) if isinstance(value, list | tuple) else set()

    return names(list(globals().values()))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence and exit code 2, instead of a screen of usage."""
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ", 1)[1].split()[0].split("=")[0]
            message = self._without_a_flag(wrong)
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def _without_a_flag(self, wrong):
        """What to say of a word of the command line that is no flag of this script."""
        known = self._option_string_actions
        if not wrong.startswith("-"):
            return (
                f"'{wrong}' belongs to no flag: one that is on or off takes no value, and a value with spaces, quotes"
            )
        ours = f"--{KOHYA.get(wrong.removeprefix('--'))}"
        if ours in known:
            return f"there is no flag {wrong}; here it is {ours}"
        if wrong.removeprefix("--") in _known_somewhere():
            others = f"there is no flag {wrong} here, only in others of these scripts"
            return others + suggestion(wrong, known, cutoff=0.8)
        return f"there is no flag {wrong}" + suggestion(wrong, known)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=119)


def build(description, groups, defaults=None, exit_on_error=True):
    """The parser for `groups`, a list of (title, [Flag]). A value the user did not give is absent from its result.

    That it is required is not looked at here. Each --NAME that is on or off has a --no_NAME, which the help leaves
    out. Without `exit_on_error` a value that is wrong raises argparse.ArgumentError.
    """
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # an abbreviated --hub_token would not be recognised as a secret
        exit_on_error=exit_on_error,
    )
    defaults = defaults or {}
    for title, flags in groups:
        section = parser.add_argument_group(title)
        for flag in flags:
            default = defaults.get(flag.name, flag.default)
            text = flag.help + (f" (default: {default})" if default is not None and flag.kind is not bool else "")
            kind = {"action": "store_true"} if flag.kind is bool else {"type": flag.kind, "nargs": flag.nargs}
            if flag.choices:
                kind["choices"] = flag.choices
            elif flag.kind is not bool:
                kind["metavar"] = {int: "N", float: "X"}.get(getattr(flag.kind, "kind", flag.kind), "TEXT")
            section.add_argument(f"--{flag.name}", help=text.replace("%", "%%"), **kind)
            if flag.kind is bool:
                hidden = {"action": "store_false", "dest": flag.name, "help": argparse.SUPPRESS}
                section.add_argument(f"--no_{flag.name}", **hidden)
    return parser


def parse(argv, description, groups, defaults=None):
    """Parse and check a command line. Returns a Namespace; its `given` is the set of flags that the user wrote, there
    or in the file that --config names, its `notices` a list of sentences that the user should see, its `helps` the
    groups as [(title, {name: help})].

    Exits with 2 and one sentence for a wrong flag, a wrong value or flags that contradict each other.
    """
    parser = build(description, groups, defaults)
    given = vars(parser.parse_args(argv))
    known = {flag.name: flag for _, flags in groups for flag in flags}
    if "config" in given:
        filed = _from_file(parser, given["config"], known, build(description, groups, exit_on_error=False))
        beaten = set() if given.keys().isdisjoint(DROPOUTS) else DROPOUTS  # by either name on the command line
        beaten |= {steps for epochs, steps in EPOCHS.items() if epochs in given}
        given = {name: value for name, value in filed.items() if name not in beaten} | given
    missing = [f"--{name}" for name, flag in known.items() if flag.required and name not in given]
    if missing and not given.get("check_data"):  # which looks at no model
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    for name in ("train_data_dir", "resume_from_checkpoint"):  # an unset variable of the shell: not given, as ever
        if given.get(name) == "":
            del given[name]
    values = {name: flag.default for name, flag in known.items()} | (defaults or {}) | given
    args = argparse.Namespace(**values, given=frozenset(name for name in given if given[name] is not False))
    args.helps = [(title, {flag.name: flag.help for flag in flags}) for title, flags in groups]
    if args.hub_token is None:
        args.hub_token = os.environ.get(HANDED_ON)
    if "LOCAL_RANK" in os.environ:
        args.local_rank = int(os.environ["LOCAL_RANK"])
    problem = _contradiction(args)
    if problem:
        parser.error(problem)
    if getattr(args, "use_8bit_adam", False):
        args.optimizer = "adamw8bit"
    if getattr(args, "proportion_empty_prompts", 0):
        args.caption_dropout = args.proportion_empty_prompts
    if getattr(args, "full_bf16", False):
        args.mixed_precision = "bf16"
    usual = {name: flag.default for name, flag in known.items()}
    args.notices = _notices(args, {name for name in args.given if name in usual and values[name] != usual[name]})
    if args.dry_run:  # look at each step, and leave nothing behind
        args.logging_steps, args.validation_steps, args.checkpointing_steps = 1, 0, 0
        args.report_to, args.push_to_hub, args.validation_at_start = "none", False, False
        if getattr(args, "cache_latents", False) or getattr(args, "cache_text_embeddings", False):
            args.dataloader_num_workers = 0  # the frozen networks run where the samples are made
    if not (vars(args).get("cache_latents") and _crops_at_random(args)):
        args.cached_crops = None
    if not args.streaming:
        args.shuffle_buffer = None
    return args


def parse_report(argv=None):
    """The command line of tools.report: a Namespace of `folders`, a list, and `output`, or None."""
    parser = _Parser(prog="python -m tools.report", description="Write one page about a run, or about several.")
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="output folder of a run")
    parser.add_argument("--output", metavar="FILE", help="the page; left out, report.html in the first folder")
    return parser.parse_args(argv)


def _from_file(parser, path, known, values):
    """The flags that a file gives, {name: value}; exits as the parser does. `values` is one that raises errors."""

    def convert(name, text):
        try:
            value = getattr(values.parse_args([f"--{name}={text}"]), name)
        except argparse.ArgumentError as error:
            raise ValueError(error.message) from None
        return value[0] if known[name].nargs else value

    try:
        return run_file.read(path, known, NOT_IN_A_FILE, convert)
    except ValueError as error:
        parser.error(str(error))


def as_file(args, script, seed):
    """The text of run.yaml: the values that a run has, but for secrets and what is for once; its seed too."""

    about = [
        f"The flags of a run of {script}. --config with this file repeats it; flags beside --config win.",
        "A relative path begins in the folder that the command is called in. A flag that is commented out follows",
        "from the others, or has no effect beside them.",
    ]
    silent = {"max_train_steps"} | _silent_looks(args)
    if args.lr_scheduler == "constant":
        silent.add("lr_warmup_steps")
    if not getattr(args, "aspect_ratio_bucketing", False):
        silent.add("bucket_reso_steps")
    values = {name: value for name, value in public(args).items() if name not in ONCE} | {"seed": seed}
    return run_file.text(about, args.helps, values, silent - args.given)


def _silent_looks(args):
    """The flags about validation that have no effect, since there is nothing to draw or to look at."""
    if vars(args).get("validation_prompts") or vars(args).get("validation_prompt"):
        return set()
    looks = {"validation_steps", "validation_epochs", "validation_at_start"}
    return {"num_validation_images"} | (set() if args.validation_split else looks)


def _crops_at_random(args):
    return vars(args).get("random_crop", not vars(args).get("center_crop", True))


def _needed(args):
    """What flags need to say anything, {name: (whether it is there, the words for it)}."""
    get, bias = vars(args).get, vars(args).get("timestep_bias_strategy")
    average = (get("use_ema"), "--use_ema")
    portion, between = "--timestep_bias_strategy earlier or later", "--timestep_bias_strategy range"
    return {
        "ema_decay": average,
        "offload_ema": average,
        "dream_detail_preservation": (get("dream_training"), "--dream_training"),
        "lr_num_cycles": (args.lr_scheduler == "cosine_with_restarts", "--lr_scheduler cosine_with_restarts"),
        "lr_power": (args.lr_scheduler == "polynomial", "--lr_scheduler polynomial"),
        "timestep_bias_multiplier": (bias != "none", "a --timestep_bias_strategy"),
        "timestep_bias_portion": (bias in ("earlier", "later"), portion),
        "timestep_bias_begin": (bias == "range", between),
        "timestep_bias_end": (bias == "range", between),
    }


def _notices(args, changed):
    """What is not wrong but surely not meant, as a list of sentences; `changed` are the flags given other values than
    their defaults."""
    notices = [
        f"--{name} has no effect without {words}"
        for name, (there, words) in _needed(args).items()
        if name in changed and not there
    ]
    if "timestep_bias_strategy" in changed and args.timestep_bias_multiplier == 1:
        notices.append(
            f"--timestep_bias_strategy {args.timestep_bias_strategy} draws all timesteps alike with "
            "--timestep_bias_multiplier 1; give it another one"
        )
    if args.lr_scheduler == "constant" and "lr_warmup_steps" in args.given and args.lr_warmup_steps:
        notices.append("--lr_scheduler constant has no warm-up; use constant_with_warmup for --lr_warmup_steps")
    elif args.lr_scheduler != "constant" and args.lr_warmup_steps >= (args.max_train_steps or float("inf")):
        notices.append(
            f"--lr_warmup_steps {args.lr_warmup_steps} leaves nothing after the warm-up in {args.max_train_steps} "
            "steps: the learning rate never gets to --learning_rate"
        )
    for name in sorted(args.given & _silent_looks(args)):
        notices.append(f"--{name} has no effect without a validation prompt or, for the loss, a --validation_split")
    folder, out = args.train_data_dir and os.path.realpath(args.train_data_dir), args.output_dir
    if folder and out and os.path.realpath(out).startswith(os.path.join(folder, "")):
        notices.append(
            f"--output_dir {out} lies in --train_data_dir: a later run would take the images that this one draws "
            "for data, unless metadata name those that are meant"
        )
    if getattr(args, "optimizer", None) == "prodigy" and args.learning_rate != 1:
        notices.append(
            f"--optimizer prodigy multiplies the step size that it finds by --learning_rate {args.learning_rate:g}; "
            "it is made for --learning_rate 1"
        )
    return notices


EPOCHS = {"num_train_epochs": "max_train_steps", "validation_epochs": "validation_steps"}  # the latter wins
DROPOUTS = {"caption_dropout", "proportion_empty_prompts"}  # two names of one setting


def _missing(package):
    return importlib.util.find_spec(package) is None


def _contradiction(args):
    """The first thing that is wrong with flags which are each right by themselves, as a sentence, or None."""
    get = vars(args).get
    problem = _folder_problem(args) or _data_problem(args) or _bucket_problem(args) or _launch_problem(args)
    if problem:
        return problem
    if get("single_file_config") is not None:
        if not os.path.isfile(args.pretrained_model_name_or_path or ""):
            return "--single_file_config is for a model in one .safetensors file, which this one is not"
        if not os.path.isdir(args.single_file_config):
            return f"--single_file_config {args.single_file_config} is not a folder"
    if get("dream_training") and get("input_perturbation"):
        return "--dream_training and --input_perturbation both shift the input against the target; use one of them"
    if get("dream_training") and get("prediction_type") == "v_prediction":
        return "--dream_training is defined for epsilon prediction only"
    if get("use_8bit_adam") and "optimizer" in args.given and args.optimizer != "adamw8bit":
        return f"--use_8bit_adam contradicts --optimizer {args.optimizer}"
    if (get("use_8bit_adam") or get("optimizer") in ("adamw8bit", "paged_adamw8bit")) and _missing("bitsandbytes"):
        return "8-bit Adam needs bitsandbytes: pip install bitsandbytes"
    if get("optimizer") == "prodigy":
        if _missing("prodigyopt"):
            return "--optimizer prodigy needs prodigyopt: pip install prodigyopt==1.1.2"
        if not args.learning_rate or not args.adam_epsilon:
            return "--optimizer prodigy needs a --learning_rate and an --adam_epsilon above 0"
        for name in ("fused_backward_pass", "full_bf16"):
            if get(name):
                return f"--optimizer prodigy finds one step size for all weights, and --{name} updates them one by one"
    if get("fused_backward_pass"):
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
    if get("full_bf16") and args.mixed_precision in ("no", "fp16"):
        return f"--full_bf16 computes in bfloat16, and contradicts --mixed_precision {args.mixed_precision}"
    if get("enable_xformers_memory_efficient_attention") and _missing("xformers"):
        return "--enable_xformers_memory_efficient_attention needs xFormers: pip install xformers==0.0.35"
    if get("proportion_empty_prompts") and get("caption_dropout") not in (0, args.proportion_empty_prompts):
        return "--proportion_empty_prompts and --caption_dropout mean the same; give one of them"
    if get("timestep_bias_strategy") == "range" and args.timestep_bias_begin >= args.timestep_bias_end:
        return f"--timestep_bias_begin {args.timestep_bias_begin} is not below its end, {args.timestep_bias_end}"
    if get("enable_npu_flash_attention") and _missing("torch_npu"):
        return "--enable_npu_flash_attention needs an Ascend NPU and torch_npu: pip install torch_npu"
    if get("lr_scheduler") == "polynomial" and args.learning_rate <= 1e-7:
        return f"--lr_scheduler polynomial ends at 1e-7, so --learning_rate {args.learning_rate} must be above it"
    if "cached_crops" in args.given and not (get("cache_latents") and _crops_at_random(args)):
        return "--cached_crops is for --cache_latents with random crops"
    if get("use_dora") and get("save_kohya_format"):
        return "--save_kohya_format has no agreed place for what --use_dora learns; leave one of them out"
    if get("cache_text_embeddings") and get("train_text_encoder"):
        return "--cache_text_embeddings keeps what the text encoders make, which --train_text_encoder changes"
    for name in ("hub_private_repo", "push_checkpoints"):
        if get(name) and not args.push_to_hub:
            return f"--{name} has no effect without --push_to_hub; give both or neither"
    report_to = get("report_to")
    if report_to not in (None, "all", "none") and _missing(report_to):
        return f"--report_to {report_to} needs {report_to}: pip install {report_to}, or give --report_to none"
    return None


def _folder_problem(args):
    """The first thing that is wrong with where the run reads and where it writes, or None."""
    get = vars(args).get
    for name, value in vars(args).items():
        if value == "" and (name == "output_dir" or name.endswith("_name_or_path")):
            return f"--{name} is empty; is a variable of the shell not set?"
    if args.output_dir and os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        return f"--output_dir {args.output_dir} is a file"
    read = {"train_data_dir"}
    if "rank" not in vars(args) or schedule_changes(args):  # adapters may lie beside their model, a sampler may not
        read |= {name for name in vars(args) if name.endswith("model_name_or_path")}
    for name in sorted(name for name in read if args.output_dir and get(name)):
        if os.path.realpath(get(name)) == os.path.realpath(args.output_dir):
            what = "its own data" if name == "train_data_dir" else "the model that it begins with"
            return f"--output_dir and --{name} are one folder, {get(name)}: the run would write over {what}"
    return None


def _data_problem(args):
    """The first thing that is wrong with the flags that say where the data are and how captions are read, or None."""
    get = vars(args).get
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
    if "shuffle_buffer" in args.given and not args.streaming:
        return "--shuffle_buffer has no effect without --streaming; give both or neither"
    if args.streaming:
        for name, why in NOT_STREAMED.items():
            if get(name):
                return f"--{name} {why}; leave it or --streaming out"
    if get("keep_tokens") and not args.shuffle_tags:
        return "--keep_tokens has no effect without --shuffle_tags; give both or neither"
    if get("shuffle_tags") and get("cache_text_embeddings"):
        return "--cache_text_embeddings keeps what the text encoders make of a caption, which --shuffle_tags changes"
    return None


def _launch_problem(args):
    """The first thing that is wrong with how accelerate has launched this run, beside its flags, or None."""
    if launch.compiles_by_regions() and "aspect_ratio_bucketing" in vars(args):  # a UNet, which asks if it has a part
        return "accelerate cannot compile this network by regions; launch without --dynamo_use_regional_compilation"
    if launch.uses_deepspeed():
        return _sharing_problem(args, "DeepSpeed") or _deepspeed_problem(args)
    if launch.uses_fsdp():
        return _sharing_problem(args, "FSDP") or _fsdp_problem()
    return None


def _sharing_problem(args, engine):
    """The first thing that does not go with weights that processes share out among themselves, or None."""
    get, told = vars(args).get, os.environ.get
    if "rank" in vars(args):
        return f"adapters are too few weights to share out with {engine}; launch with --multi_gpu"
    if launch.dynamo_backend() != "no":
        return f"a network whose weights {engine} shares out is not compiled; launch without --dynamo_backend"
    if (args.mixed_precision or told("ACCELERATE_MIXED_PRECISION")) == "fp16":
        return f"weights that {engine} shares out are trained in bf16 or without --mixed_precision, not in fp16"
    if get("optimizer") != "adamw" or get("use_8bit_adam"):
        return f"weights that {engine} shares out are updated by --optimizer adamw alone"
    for name in ("full_bf16", "fused_backward_pass"):
        if get(name):
            return f"--{name} updates weights one by one, and {engine} shares each of them out; leave one of them out"
    return None


def _fsdp_problem():
    """The first thing that FSDP was told and that is not supported, or None."""
    told = os.environ.get
    if told("FSDP_VERSION", "1") != "2":
        return "of FSDP's two versions only the second is supported; launch with --fsdp_version 2"
    for name, instead in (("offload_params", "more GPUs"), ("activation_checkpointing", "--gradient_checkpointing")):
        if told(f"FSDP_{name.upper()}", "false").lower() == "true":
            return f"fsdp_{name} in accelerate's configuration is not supported; use {instead} instead"
    if told("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        return (
            "weights that were left whole after a forward would hide an average; leave fsdp_reshard_after_forward out"
        )
    return None


def _deepspeed_problem(args):
    """The first thing that DeepSpeed was told and that is not supported, or contradicts the flags, or None."""
    try:
        settings = launch.deepspeed_settings()
    except (OSError, ValueError) as error:
        return f"DeepSpeed's configuration {launch.deepspeed_file()} cannot be read: {error}"
    if settings[launch.STAGE] not in (1, 2):
        return (
            "of DeepSpeed's ZeRO only stages 1 and 2 are supported; to share weights out too, launch with --use_fsdp "
            "--fsdp_version 2"
        )
    for what in ("optimizer", "param"):
        if f"zero_optimization.offload_{what}.device" in settings:
            return f"DeepSpeed's offload_{what}_device is not supported; use more GPUs instead"
    if any(name.startswith("scheduler.") for name in settings):
        return "the learning rate follows --lr_scheduler; leave the scheduler out of DeepSpeed's configuration"
    batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    window = batch * accumulation * int(os.environ.get("WORLD_SIZE", 1))
    betas = [args.adam_beta1, args.adam_beta2]
    wanted = {
        "optimizer.type": ("AdamW", "--optimizer adamw"),
        "optimizer.params.lr": (args.learning_rate, f"--learning_rate {args.learning_rate:g}"),
        "optimizer.params.betas": (betas, f"--adam_beta1 {betas[0]:g} --adam_beta2 {betas[1]:g}"),
        "optimizer.params.eps": (args.adam_epsilon, f"--adam_epsilon {args.adam_epsilon:g}"),
        "optimizer.params.weight_decay": (args.adam_weight_decay, f"--adam_weight_decay {args.adam_weight_decay:g}"),
        "gradient_clipping": (args.max_grad_norm, f"--max_grad_norm {args.max_grad_norm:g}"),
        "gradient_accumulation_steps": (accumulation, f"--gradient_accumulation_steps {accumulation}"),
        "train_micro_batch_size_per_gpu": (batch, f"--train_batch_size {batch}"),
        "train_batch_size": (window, f"{window} images in a step"),
        "bf16.enabled": (precision == "bf16", f"--mixed_precision {precision}"),
        "fp16.enabled": (False, f"--mixed_precision {precision}"),
    }
    for name, (value, flag) in wanted.items():
        if settings.get(name, value) != value:
            return (
                f"{name} {json.dumps(settings[name])} in the configuration of DeepSpeed contradicts {flag}; write "
                '"auto" there, or the same in both'
            )
    if _missing("deepspeed"):
        return "DeepSpeed is not installed: pip install deepspeed==0.19.8"
    return None


def _bucket_problem(args):
    """The first thing that is wrong with the flags of the aspect-ratio buckets, as a sentence, or None."""
    if not getattr(args, "aspect_ratio_bucketing", False):
        alone = args.given & {"min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"}
        return (
            f"--{min(alone)} has no effect without --aspect_ratio_bucketing; give both or neither" if alone else None
        )
    limits = bucket_limits(args)
    side, smallest, largest, step = limits["resolution"], limits["smallest"], limits["largest"], limits["step"]
    if smallest > side:
        return f"--min_bucket_reso {smallest} is above --resolution {side}, about the side of the square shape"
    if largest < side:
        return f"--max_bucket_reso {largest} is below --resolution {side}, about the side of the square shape"
    if side // step * step < smallest:
        return f"--bucket_reso_steps {step} has no multiple from {smallest} to {side}, as the square shape needs one"
    return None


def hide_secrets(args):
    """Start this process anew without its secrets in the command line, which every user of a machine can list.

    The token goes on in the environment, which others cannot read. A launcher's command line is not ours to change.
    """
    if "hub_token" in args.given and os.name == "posix":
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        if launched and os.environ.get("RANK", "0") == "0":
            print(
                "warning: the launcher shows --hub_token to every user of this machine, in the list of processes; "
                "`hf auth login`, once, makes the flag unnecessary",
                file=sys.stderr,
            )
        os.environ[HANDED_ON] = args.hub_token
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *without_secrets(sys.orig_argv[1:])])


def public(args):
    """The settings as a plain dict, without the secrets: what trackers, manifests and model cards may see."""
    return {name: value for name, value in vars(args).items() if name not in SECRETS | {"given", "notices", "helps"}}


def machine(args):
    """How the run uses its machine, as engine.make_accelerator takes it."""
    return {
        "output_dir": args.output_dir,
        "logging_dir": args.logging_dir,
        "accumulation": args.gradient_accumulation_steps,
        "mixed_precision": args.mixed_precision,
        "report_to": args.report_to,
        "timeout": args.process_group_timeout,
        "allow_tf32": args.allow_tf32,
        "fused_backward": getattr(args, "fused_backward_pass", False),
    }


def hub(args):
    """Where the result and the checkpoints are uploaded, as hub.start takes it."""
    return {
        "push": args.push_to_hub,
        "name": args.hub_model_id,
        "output_dir": args.output_dir,
        "token": args.hub_token,
        "private": args.hub_private_repo,
        "checkpoints": args.push_checkpoints,
    }


def optimizer(args, window):
    """The optimizer and its settings, as engine.make_optimizer takes them; `window` is the samples of a step."""
    return {
        "name": args.optimizer,
        "learning_rate": args.learning_rate * (window if args.scale_lr else 1),
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "epsilon": args.adam_epsilon,
    }


def learning_rate_curve(args):
    """The learning rate over the steps of a run, as diffusers' get_scheduler takes it."""
    return {
        "name": args.lr_scheduler,
        "num_warmup_steps": args.lr_warmup_steps,
        "num_training_steps": args.max_train_steps,
        "num_cycles": args.lr_num_cycles,
        "power": args.lr_power,
    }


def drawing(args):
    """How validation images are drawn, as the pipelines of Stable Diffusion and SDXL take it."""
    return {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.validation_num_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
    }


def prompts(args):
    """The prompts of the validation images, a list: --validation_prompts, or --validation_prompt as often as it is
    drawn."""
    if vars(args).get("validation_prompt"):
        return [args.validation_prompt] * args.num_validation_images
    return vars(args).get("validation_prompts") or []


def schedule_changes(args):
    """What the flags change in the configuration of the base model's scheduler, a dict."""
    return {name: value for name in ("prediction_type", "rescale_betas_zero_snr") if (value := vars(args).get(name))}


def data_source(args):
    """Where the data are, as data.load_rows takes it; the Kandinsky decoders read no captions."""
    return {
        "dataset_name": args.dataset_name,
        "config_name": args.dataset_config_name,
        "folder": args.train_data_dir,
        "cache_dir": args.cache_dir,
        "image_column": args.image_column,
        "caption_column": getattr(args, "caption_column", None),
        "repeats_from_folders": args.repeats_from_folders,
        "config": args.train_data_config,
        "shuffle_buffer": args.shuffle_buffer,
    }


def bucket_limits(args):
    """What the buckets of --aspect_ratio_bucketing are, as buckets.make takes it; None without that flag."""
    if not getattr(args, "aspect_ratio_bucketing", False):
        return None
    return {
        "resolution": args.resolution,
        "smallest": args.resolution // 2 if args.min_bucket_reso is None else args.min_bucket_reso,
        "largest": args.resolution * 2 if args.max_bucket_reso is None else args.max_bucket_reso,
        "step": args.bucket_reso_steps,
    }


def encoding_folder(args):
    """Where the caches of what frozen networks make are; None in a dry run, which keeps nothing."""
    if args.dry_run:
        return None
    return args.encoding_cache_dir or os.path.join(downloads(args.cache_dir), "text-to-image-encodings")


def downloads(cache_dir):
    """The folder where downloads are kept, and what is made of them beside them: --cache_dir, or the hub client's."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return cache_dir or os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface"))


def mathematics(args):
    """The settings that decide what the weights become, as a dict that JSON can hold."""
    return {name: value for name, value in vars(args).items() if name in MATHEMATICS}


def without_secrets(argv=None):
    """The command line as a list, the values of secret flags left out."""
    kept, skip = [], False
    for word in sys.argv[1:] if argv is None else argv:
        name = word.lstrip("-").split("=")[0]
        secret = word.startswith("--") and name in SECRETS
        if not secret and not skip:
            kept.append(word)
        skip = secret and "=" not in word
    return kept
