"""Flags about what a run does beside learning: validation, checkpoints, caches, speed and memory, logs and the hub."""

from training_utils.cli.flag import Flag, Group, differs, needs
from training_utils.cli.packages import Package
from training_utils.cli.scripts import ADAPTERS, DECODERS, EVERY, FULL, JAX, KANDINSKY, PRIORS, SDXL, TORCH
from training_utils.cli.values import integer, number, path

TRACKERS = tuple("tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio all none".split())
TRACKERS_OF_JAX = ("tensorboard", "wandb", "all", "none")
XFORMERS = Package("xformers", pip="xformers==0.0.35", title="xFormers")
ONE_PROMPT = ADAPTERS | SDXL  # the scripts that draw several images of one prompt; the others draw one of each
TO_VALIDATE = needs("validation_prompts", "validation_prompt", "validation_split", even_default=True,
                    words="a validation prompt or, for the loss, a --validation_split")  # fmt: skip

# fmt: off
VALIDATION = Group("Validation", (
    Flag("validation_prompts", str, None, "draw one image for each of these prompts", nargs="+",
         scripts=EVERY - ONE_PROMPT),
    Flag("validation_prompt", str, None, "draw images for this prompt", scripts=ONE_PROMPT,
         other_names=("sample_prompts",)),
    Flag("num_validation_images", integer(0), 4, "how many; 0 means none", scripts=ONE_PROMPT,
         needs=needs("validation_prompt", even_default=True, words="a validation prompt")),
    Flag("validation_epochs", integer(0), 5, "epochs between validations; 0 means never", needs=TO_VALIDATE,
         replaces=("validation_steps",), variants=(differs(ADAPTERS | SDXL, default=1),)),
    Flag("validation_steps", integer(0), None, "steps between validations, instead of --validation_epochs",
         needs=TO_VALIDATE, other_names=("sample_every_n_steps",)),
    Flag("validation_at_start", bool, False, "validate before the first step too, to see what the model did before",
         needs=TO_VALIDATE, other_names=("sample_at_first",)),
    Flag("validation_num_inference_steps", integer(1), 20, "sampler steps of a validation image"),
    Flag("validation_guidance_scale", number(), 7.5, "guidance scale of the validation images; 1 or less means off",
         variants=(differs(KANDINSKY, default=4.0),)),
    Flag("validation_split", number(0, 0.9), 0.0, "share of the images kept for val_loss", shapes_result=True),
))
CHECKPOINTS = Group("Checkpoints", (
    Flag("checkpointing_steps", integer(0), 500, "steps between checkpoints; one is written at the end too; 0: never",
         other_names=("save_every_n_steps", "save_state")),
    Flag("checkpoints_total_limit", integer(1), None, "keep this many checkpoints; the oldest are removed once "
         "a new one is written"),
    Flag("resume_from_checkpoint", path, None, "`latest`, a checkpoint's name in --output_dir, or a path", once=True,
         other_names=("resume",)),
))
CACHES = Group("Caches: frozen networks run once", (
    Flag("cache_latents", bool, False, "let the networks that see images run once for each image and keep on disk "
         "what they make of it, for this run and later ones", other_names=("cache_latents_to_disk",),
         not_streamed="keeps on the disk what is made of every image; --streaming is for datasets too large for it"),
    Flag("cached_crops", integer(1), 1, "how many random crops of each image to keep; every epoch takes one of them",
         scripts=EVERY - PRIORS, shapes_result=True,
         needs=needs("cache_latents", refused=True, even_default=True)),
    Flag("cache_text_embeddings", bool, False, "the same for the text encoders and captions",
         scripts=EVERY - DECODERS, other_names=("cache_text_encoder_outputs_to_disk",),
         not_streamed="keeps on the disk what is made of every caption, after reading them all"),
    Flag("encoding_cache_dir", path, None, "folder for both; left out, one beside the downloads"),
))
HARDWARE = Group("Speed and memory", (
    Flag("mixed_precision", str, None, "precision of the computation; left out, what accelerate is configured for",
         ("no", "fp16", "bf16"), shapes_result=True,
         variants=(differs(JAX, default="no", help="precision of the computation; the weights stay float32. bf16 is "
                           "the one for TPUs"),)),
    Flag("gradient_checkpointing", bool, False, "recompute activations: much less memory, about a third slower"),
    Flag("allow_tf32", bool, False, "TF32 matrix products on Ampere and later GPUs: faster, slightly less exact",
         scripts=TORCH),
    Flag("enable_xformers_memory_efficient_attention", bool, False, "attention by xFormers; for GPUs without a fast "
         "built-in attention", scripts=TORCH, package=XFORMERS, other_names=("xformers",)),
    Flag("process_group_timeout", integer(1), 1800, "seconds that processes wait for each other before they give up",
         scripts=TORCH),
    Flag("local_rank", int, -1, "set by old launchers; leave it alone", once=True),
    Flag("fused_backward_pass", bool, False, "update each weight during the backward pass and free its gradient: "
         "saves the gradients' memory; needs --max_grad_norm 0", scripts=FULL & TORCH),
    Flag("full_bf16", bool, False, "weights, gradients and optimizer state in bfloat16, rounded stochastically: half "
         "their memory, slightly less exact", scripts=FULL & TORCH, shapes_result=True),
    Flag("compilation_cache_dir", path, None, "folder that keeps the compiled step for the next start", scripts=JAX),
))
REPORTING = Group("Logs and the hub", (
    Flag("report_to", str, "tensorboard", "where the curves go; `all`: every tracker that is installed", TRACKERS,
         variants=(differs(JAX, choices=TRACKERS_OF_JAX),)),
    Flag("logging_dir", path, "logs", "folder for the trackers' files, inside --output_dir"),
    Flag("logging_steps", integer(1), 10, "steps between two reads of the losses from the device; every step is "
         "still logged"),
    Flag("tracker_project_name", str, "text2image-fine-tune", "the project's name in the tracker"),
    Flag("push_to_hub", bool, False, "upload the result at the end"),
    Flag("hub_token", str, None, "token for the upload; `hf auth login` keeps it out of the shell history and the "
         "list of processes", secret=True, not_in_file="is a secret and a file is read by others; use `hf auth "
         "login`, or give it on the command line"),
    Flag("hub_model_id", str, None, "repository to upload to; left out, the name of --output_dir"),
    Flag("hub_private_repo", bool, False, "create the repository as a private one",
         needs=needs("push_to_hub", refused=True)),
    Flag("push_checkpoints", bool, False, "upload each checkpoint too, in the background, to the repository's branch "
         "`checkpoints`", needs=needs("push_to_hub", refused=True)),
    Flag("debug_loss", bool, False, "log the loss of each image under its file name; waits for the device",
         scripts=frozenset(["train_text_to_image_lora_sdxl"])),
))
# fmt: on
GROUPS = (VALIDATION, CHECKPOINTS, CACHES, HARDWARE, REPORTING)
