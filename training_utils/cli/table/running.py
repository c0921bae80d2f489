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
         scripts=EVERY - ONE_PROMPT, other_names=("sample_prompts", "sample_prompt", "prompts", "prompt")),
    Flag("validation_prompt", str, None, "draw images for this prompt", scripts=ONE_PROMPT,
         other_names=("sample_prompts", "sample_prompt", "prompts", "prompt")),
    Flag("num_validation_images", integer(0), 4, "how many; 0 means none", scripts=ONE_PROMPT,
         needs=needs("validation_prompt", even_default=True, words="a validation prompt")),
    Flag("validation_epochs", integer(0), 5, "epochs between validations; 0 means never", needs=TO_VALIDATE,
         other_names=("sample_every_n_epochs", "validate_every_n_epochs", "validation_epoch_interval"),
         replaces=("validation_steps",), variants=(differs(ADAPTERS | SDXL, default=1),)),
    Flag("validation_steps", integer(0), None, "steps between validations, instead of --validation_epochs",
         needs=TO_VALIDATE, other_names=("sample_every_n_steps", "validate_every_n_steps", "validation_step_interval",
                                           "sample_every")),
    Flag("validation_at_start", bool, False, "validate before the first step too, to see what the model did before",
         needs=TO_VALIDATE, other_names=("sample_at_first", "validation_on_startup")),
    Flag("validation_num_inference_steps", integer(1), 20, "sampler steps of a validation image",
         other_names=("num_inference_steps", "inference_steps", "sample_steps")),
    Flag("validation_guidance_scale", number(), 7.5, "guidance scale of the validation images; 1 or less means off",
         other_names=("guidance_scale", "validation_guidance", "cfg_scale"),
         variants=(differs(KANDINSKY, default=4.0),)),
    Flag("validation_split", number(0, 0.9), 0.0, "share of the images kept for val_loss", shapes_result=True,
         other_names=("val_split", "validation_fraction")),
))
CHECKPOINTS = Group("Checkpoints", (
    Flag("checkpointing_steps", integer(0), 500, "steps between checkpoints; one is written at the end too; 0: never",
         other_names=("save_every_n_steps", "save_state", "save_steps", "save_every", "checkpoint_steps",
                      "checkpoint_step_interval")),
    Flag("checkpoints_total_limit", integer(1), None, "keep this many checkpoints; the oldest are removed once "
         "a new one is written",
         other_names=("save_total_limit", "max_checkpoints", "save_last_n_steps", "save_last_n_steps_state",
                      "save_last_n_epochs", "save_last_n_epochs_state", "max_step_saves_to_keep")),
    Flag("resume_from_checkpoint", path, None, "`latest`, a checkpoint's name in --output_dir, or a path", once=True,
         other_names=("resume", "resume_from", "continue_last_backup latest")),
))
CACHES = Group("Caches: frozen networks run once", (
    Flag("cache_latents", bool, False, "let the networks that see images run once for each image and keep on disk "
         "what they make of it, for this run and later ones", other_names=("cache_latents_to_disk", "latent_caching"),
         not_streamed="keeps on the disk what is made of every image; --streaming is for datasets too large for it"),
    Flag("cached_crops", integer(1), 1, "how many random crops of each image to keep; every epoch takes one of them",
         scripts=EVERY - PRIORS, shapes_result=True,
         needs=needs("cache_latents", refused=True, even_default=True)),
    Flag("cache_text_embeddings", bool, False, "the same for the text encoders and captions",
         scripts=EVERY - DECODERS,
         other_names=("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
                      "pre_compute_text_embeddings"),
         not_streamed="keeps on the disk what is made of every caption, after reading them all"),
    Flag("encoding_cache_dir", path, None, "folder for both; left out, one beside the downloads",
         other_names=("cache_dir_vae", "cache_dir_text", "latent_cache_dir")),
))
HARDWARE = Group("Speed and memory", (
    Flag("mixed_precision", str, None, "precision of the computation; left out, what accelerate is configured for",
         ("no", "fp16", "bf16"), shapes_result=True,
         other_names=("precision", "train_dtype", "dtype", "fp16 fp16", "bf16 bf16"),
         variants=(differs(JAX, default="no", help="precision of the computation; the weights stay float32. bf16 is "
                           "the one for TPUs"),)),
    Flag("gradient_checkpointing", bool, False, "recompute activations: much less memory, about a third slower",
         other_names=("activation_checkpointing",)),
    Flag("allow_tf32", bool, False, "TF32 matrix products on Ampere and later GPUs: faster, slightly less exact",
         scripts=TORCH, other_names=("tf32",)),
    Flag("enable_xformers_memory_efficient_attention", bool, False, "attention by xFormers; for GPUs without a fast "
         "built-in attention", scripts=TORCH, package=XFORMERS,
         other_names=("xformers", "use_xformers", "diffusers_xformers")),
    Flag("process_group_timeout", integer(1), 1800, "seconds that processes wait for each other before they give up",
         scripts=TORCH, other_names=("ddp_timeout",)),
    Flag("local_rank", int, -1, "set by old launchers; leave it alone", once=True),
    Flag("fused_backward_pass", bool, False, "update each weight during the backward pass and free its gradient: "
         "saves the gradients' memory; needs --max_grad_norm 0", scripts=FULL & TORCH,
         other_names=("fuse_optimizer", "blockwise_fused_optimizers", "fused_optimizer_groups")),
    Flag("full_bf16", bool, False, "weights, gradients and optimizer state in bfloat16, rounded stochastically: half "
         "their memory, slightly less exact", scripts=FULL & TORCH, shapes_result=True),
    Flag("compilation_cache_dir", path, None, "folder that keeps the compiled step for the next start", scripts=JAX),
))
REPORTING = Group("Logs and the hub", (
    Flag("report_to", str, "tensorboard", "where the curves go; `all`: every tracker that is installed", TRACKERS,
         other_names=("log_with", "logger", "tracker", "wandb wandb", "use_wandb wandb"),
         variants=(differs(JAX, choices=TRACKERS_OF_JAX),)),
    Flag("logging_dir", path, "logs", "folder for the trackers' files, inside --output_dir",
         other_names=("log_dir", "logdir")),
    Flag("logging_steps", integer(1), 10, "steps between two reads of the losses from the device; every step is "
         "still logged", other_names=("log_every", "log_steps", "log_interval")),
    Flag("tracker_project_name", str, "text2image-fine-tune", "the project's name in the tracker",
         other_names=("log_tracker_name", "wandb_project", "project_name")),
    Flag("push_to_hub", bool, False, "upload the result at the end"),
    Flag("hub_token", str, None, "token for the upload; `hf auth login` keeps it out of the shell history and the "
         "list of processes", secret=True, not_in_file="is a secret and a file is read by others; use `hf auth "
         "login`, or give it on the command line",
         other_names=("huggingface_token", "hf_token")),
    Flag("hub_model_id", str, None, "repository to upload to; left out, the name of --output_dir",
         other_names=("huggingface_repo_id", "hf_repo_id", "hub_repo_id", "repo_id")),
    Flag("hub_private_repo", bool, False, "create the repository as a private one",
         needs=needs("push_to_hub", refused=True),
         other_names=("huggingface_repo_visibility", "model_card_private", "private")),
    Flag("push_checkpoints", bool, False, "upload each checkpoint too, in the background, to the repository's branch "
         "`checkpoints`", needs=needs("push_to_hub", refused=True),
         other_names=("push_checkpoints_to_hub", "save_state_to_huggingface")),
    Flag("debug_loss", bool, False, "log the loss of each image under its file name; waits for the device",
         scripts=frozenset(["train_text_to_image_lora_sdxl"])),
))
# fmt: on
GROUPS = (VALIDATION, CHECKPOINTS, CACHES, HARDWARE, REPORTING)
