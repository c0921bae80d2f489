"""Flags about the training: its length, the optimizer, the loss, the adapters and the average of the weights."""

from training_utils.cli.flag import Flag, Group, differs, needs
from training_utils.cli.optimizers import OPTIMIZERS, help_text
from training_utils.cli.scripts import (
    ADAPTERS,
    EVERY,
    FULL,
    JAX,
    KANDINSKY,
    PRIORS,
    SDXL,
    STABLE_DIFFUSION,
    TORCH,
)
from training_utils.cli.values import above_zero, below_one, integer, number, path

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
BIASES = ("earlier", "later", "range")

# fmt: off
TRAINING = Group("Training", (
    Flag("config", path, None, "file of flags, such as the run.yaml of an earlier run; flags beside it win, and "
         "--no_NAME takes back one that is true in it", once=True, not_in_file="cannot be set in such a file",
         other_names=("config_file with a YAML file", "config_path with a YAML file")),
    Flag("dry_run", bool, False, "make a few steps, write nothing, and tell what would be trained, in how much "
         "memory and how long", once=True),
    Flag("output_dir", path, "sd-model-finetuned", "folder for the result, the checkpoints, the logs and the "
         "validation images",
         other_names=("output", "out_dir", "output_folder", "output_path", "save_dir", "training_folder"),
         variants=(differs(ADAPTERS, default="sd-model-finetuned-lora"),
                   differs(SDXL & FULL, default="sdxl-model-finetuned"),
                   differs(KANDINSKY & FULL, default="kandi_2_2-model-finetuned"),
                   differs(KANDINSKY & ADAPTERS, default="kandi_2_2-model-finetuned-lora"))),
    Flag("seed", integer(0, 2**62), None, "every draw of the run comes from it; left out, one is drawn and printed",
         other_names=("random_seed", "manual_seed"),
         variants=(differs(JAX, default=0, help="every draw of the run comes from it; left out, the checkpoint's "
                           "that is continued, else the default"),)),
    Flag("train_batch_size", integer(1), 16, "images per process and micro-step; lower it when memory runs out",
         shapes_result=True, other_names=("batch_size", "per_device_train_batch_size", "train_bs"),
         variants=(differs(KANDINSKY, default=1),
                   differs(JAX, help="images per device and micro-step; lower it when memory runs out"))),
    Flag("gradient_accumulation_steps", integer(1), 1, "micro-steps per step: a larger batch without more memory",
         shapes_result=True, other_names=("accumulation_steps", "grad_accum_steps", "accumulate_grad_batches")),
    Flag("num_train_epochs", integer(1), 100, "how often the run goes through the data", shapes_result=True,
         replaces=("max_train_steps",),
         other_names=("max_train_epochs", "epochs", "num_epochs", "max_epochs", "train_epochs")),
    Flag("max_train_steps", integer(1), None, "optimizer steps to make; overrides --num_train_epochs",
         shapes_result=True,
         other_names=("steps", "max_steps", "num_steps", "train_steps", "num_train_steps", "total_steps")),
))
OPTIMIZATION = Group("Optimization", (
    Flag("learning_rate", number(), 1e-4, "peak learning rate, before --scale_lr", shapes_result=True,
         other_names=("lr",)),
    Flag("scale_lr", bool, False, "multiply the learning rate by accumulation steps x batch size x processes",
         shapes_result=True, other_names=("lr_scale",),
         variants=(differs(JAX, help="multiply the learning rate by accumulation steps x batch size x devices"),)),
    Flag("lr_scheduler", str, "constant", "shape of the learning rate over the run", SCHEDULES, shapes_result=True,
         other_names=("learning_rate_scheduler", "scheduler")),
    Flag("lr_warmup_steps", integer(0), 500, "steps until the peak is reached; `constant` has no warm-up",
         shapes_result=True,
         other_names=("learning_rate_warmup_steps", "warmup_steps", "num_warmup_steps", "warmup")),
    Flag("lr_num_cycles", integer(1), 1, "hard restarts of cosine_with_restarts", shapes_result=True,
         needs=needs("lr_scheduler", values=("cosine_with_restarts",)),
         other_names=("lr_scheduler_num_cycles",)),
    Flag("lr_power", number(), 1.0, "exponent of the polynomial schedule", shapes_result=True,
         needs=needs("lr_scheduler", values=("polynomial",)), other_names=("lr_scheduler_power",)),
    Flag("optimizer", str, "adamw", help_text(), OPTIMIZERS.keys(), scripts=TORCH, shapes_result=True,
         other_names=("optimizer_type", "optim", "use_adafactor adafactor", "use_prodigy prodigy")),
    Flag("use_8bit_adam", bool, False, "the same as --optimizer adamw8bit", scripts=TORCH),
    Flag("adam_beta1", below_one, 0.9, "decay of Adam's mean of the gradient", shapes_result=True,
         other_names=("optimizer_beta1", "beta1")),
    Flag("adam_beta2", below_one, 0.999, "decay of Adam's mean of the squared gradient", shapes_result=True,
         other_names=("optimizer_beta2", "beta2")),
    Flag("adam_weight_decay", number(), 1e-2, "decoupled weight decay", shapes_result=True,
         other_names=("weight_decay", "optimizer_weight_decay"),
         variants=(differs(KANDINSKY, default=0.0),)),
    Flag("adam_epsilon", number(), 1e-8, "added to Adam's denominator", shapes_result=True,
         other_names=("optimizer_epsilon", "eps")),
    Flag("max_grad_norm", number(), 1.0, "clip the gradient to this norm; 0 means no clipping", shapes_result=True,
         other_names=("clip_grad_norm", "gradient_clipping", "grad_clip")),
    Flag("on_nan", str, "stop", "when the loss or gradient is not finite: stop and keep the last good state, or skip "
         "that step", ("stop", "skip")),
))
OBJECTIVE = Group("Objective", (
    Flag("prediction_type", str, None, "what the network predicts; left out, what the model's own scheduler says",
         ("epsilon", "v_prediction"), scripts=EVERY - KANDINSKY, shapes_result=True,
         other_names=("v_parameterization v_prediction", "v_pred v_prediction", "force_v_prediction v_prediction")),
    Flag("snr_gamma", above_zero, None, "min-SNR loss weighting (arXiv 2303.09556); 5.0 is the paper's value",
         shapes_result=True, other_names=("min_snr_gamma",)),
    Flag("noise_offset", number(), 0.0, "shift of each channel's noise; 0.1 lets images be darker or brighter",
         scripts=EVERY - PRIORS, shapes_result=True, other_names=("offset_noise", "offset_noise_weight")),
    Flag("rescale_betas_zero_snr", bool, False, "train on a schedule that ends in pure noise (arXiv 2305.08891); "
         "goes with --prediction_type v_prediction", scripts=EVERY - KANDINSKY, shapes_result=True,
         other_names=("zero_terminal_snr", "rescale_noise_scheduler_to_zero_terminal_snr")),
    Flag("input_perturbation", number(), 0.0, "noise in the input but not in the target (arXiv 2301.11706); try 0.1",
         scripts=STABLE_DIFFUSION, shapes_result=True, other_names=("ip_noise_gamma", "perturbation_noise_weight")),
    Flag("dream_training", bool, False, "DREAM (arXiv 2312.00210): one more forward pass a step, sharper detail",
         scripts=STABLE_DIFFUSION - JAX, shapes_result=True),
    Flag("dream_detail_preservation", number(), 1.0, "DREAM's exponent p; larger keeps more detail",
         scripts=STABLE_DIFFUSION - JAX, shapes_result=True, needs=needs("dream_training")),
    Flag("timestep_bias_strategy", str, "none", "timesteps to draw more often", (*BIASES, "none"), scripts=SDXL,
         shapes_result=True),
    Flag("timestep_bias_multiplier", above_zero, 1.0, "how many times as often; below 1: less often", scripts=SDXL,
         shapes_result=True,
         needs=needs("timestep_bias_strategy", values=BIASES, words="a --timestep_bias_strategy")),
    Flag("timestep_bias_begin", integer(0), 0, "first timestep of `range`", scripts=SDXL, shapes_result=True,
         needs=needs("timestep_bias_strategy", values=("range",))),
    Flag("timestep_bias_end", integer(1), 1000, "timestep after the last one of `range`", scripts=SDXL,
         shapes_result=True, needs=needs("timestep_bias_strategy", values=("range",))),
    Flag("timestep_bias_portion", number(0, 1), 0.25, "share of the timesteps that `earlier` and `later` mean",
         scripts=SDXL, shapes_result=True, needs=needs("timestep_bias_strategy", values=("earlier", "later"))),
))
LORA = Group("Adapters", (
    Flag("rank", integer(1), 4, "rank of the adapters: their size, and how much they can learn", scripts=ADAPTERS,
         shapes_result=True, other_names=("network_dim", "lora_rank", "lora_r", "lora_dim")),
    Flag("lora_alpha", above_zero, None, "scale of the adapters' term; left out, the rank", scripts=ADAPTERS,
         shapes_result=True, other_names=("network_alpha", "linear_alpha")),
    Flag("lora_dropout", number(0, 1), 0.0, "dropout on the adapters' input", scripts=ADAPTERS, shapes_result=True,
         other_names=("network_dropout", "dropout_probability")),
    Flag("use_dora", bool, False, "learn the norms of the weights' columns too (DoRA, arXiv 2402.09353)",
         scripts=ADAPTERS, shapes_result=True, other_names=("dora", "dora_wd", "lora_decompose")),
    Flag("train_text_encoder", bool, False, "adapters in the text encoder as well, for words that it does not know",
         scripts=ADAPTERS - KANDINSKY, shapes_result=True),
    Flag("save_kohya_format", bool, False, "also write the file that WebUI and ComfyUI read",
         scripts=ADAPTERS - KANDINSKY, other_names=("output_kohya_format", "kohya_format")),
))
EMA = Group("EMA weights", (
    Flag("use_ema", bool, False, "keep an exponential moving average of the weights, and save that",
         shapes_result=True, other_names=("ema",)),
    Flag("ema_decay", number(0, 1), 0.9999, "upper bound of the EMA decay; lower it for runs below 10,000 steps",
         shapes_result=True, needs=needs("use_ema")),
    Flag("offload_ema", bool, False, "keep the EMA weights in host memory; saves a model's size, costs a copy a step",
         scripts=FULL & TORCH, needs=needs("use_ema"), other_names=("ema_cpu_only",)),
    Flag("foreach_ema", bool, False, "accepted for old command lines: multi-tensor EMA steps are always on",
         scripts=FULL & TORCH),
))
# fmt: on
GROUPS = (TRAINING, OPTIMIZATION, OBJECTIVE, LORA, EMA)
