"""Flags of other trainers for which there is none here, and what there is instead.

A flag that is added here leaves this table, in which a test finds it otherwise.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Absent:
    """Flags of other trainers, by their names, and the end of the sentence "there is no flag NAME here: …"."""

    names: tuple[str, ...]
    instead: str


def absent(names: str, instead: str) -> Absent:
    """An `Absent` of names with spaces between them."""
    return Absent(tuple(names.split()), instead)


# fmt: off
ABSENT = (
    # Weights and what is trained
    absent("text_encoder_lr unet_lr learning_rate_te learning_rate_te1 learning_rate_te2 learning_rate_te3 "
           "text_encoder_learning_rate unet_learning_rate block_lr",
           "--learning_rate is that of all weights that are trained"),
    absent("adam_weight_decay_text_encoder", "--adam_weight_decay is that of all weights that are trained"),
    absent("network_train_unet_only train_unet_only train_unet",
           "the UNet is what is trained, and text encoders only with --train_text_encoder in the scripts for LoRA"),
    absent("network_train_text_encoder_only stop_text_encoder_training train_text_encoder_frac freeze_text_encoder "
           "freeze_text_encoder_1 freeze_text_encoder_2 text_encoder_limit skip_save_text_encoder",
           "text encoders are frozen, or trained in every step with --train_text_encoder in the scripts for LoRA"),
    absent("train_text_encoder_ti train_text_encoder_ti_frac placeholder_token initializer_token initializer_concept "
           "token_abstraction num_new_tokens_per_abstraction num_vectors num_vectors_per_token learnable_property "
           "token_string init_word use_object_template use_style_template modifier_token",
           "there is no textual inversion; --train_text_encoder in the scripts for LoRA helps to teach a word"),
    absent("use_lora lora", "the scripts with lora in their names train adapters"),
    absent("network_module network_args network_type lora_type lora_layers lora_blocks lora_unet_blocks use_blora "
           "lora_target_modules peft_lora_target_modules peft_lora_mode target_modules lycoris_config algo conv_dim "
           "conv_alpha conv_rank dim_from_weights lora_init_type",
           "adapters are LoRA, or DoRA with --use_dora, on the attention layers, with one --rank"),
    absent("network_weights base_weights base_weights_multiplier init_lora adapter_model_name_or_path weights",
           "adapters start at zero, or continue an earlier run with --resume_from_checkpoint"),
    absent("scale_weight_norms rank_dropout module_dropout", "adapters have --lora_dropout alone"),
    absent("clip_skip text_encoder_out_layers",
           "captions are read from the layer of the text encoder that the model's pipeline in diffusers uses"),
    absent("max_token_length tokenizer_max_length max_sequence_length no_token_padding",
           "captions are read up to the text encoder's limit, usually 77 tokens"),
    absent("v2 sdxl is_v2 model_type model_family model_flavour",
           "the script's name says which kind of model it trains, and the model's folder says the rest"),
    absent("tokenizer_name", "the tokenizer is that of the base model"),
    absent("trust_remote_code", "no code from a model or a dataset is run"),
    absent("t5xxl t5xxl_device t5xxl_dtype t5xxl_max_token_length train_t5xxl use_t5xxl_cache_only clip_l clip_g ae "
           "apply_t5_attn_mask apply_lg_attn_mask t5_dropout_rate clip_l_dropout_rate clip_g_dropout_rate "
           "train_transformer_frac guidance_embeds discrete_flow_shift flow_schedule_shift timestep_sampling "
           "sigmoid_scale training_shift model_prediction_type weighting_scheme logit_mean logit_std mode_scale "
           "do_edm_style_training enable_scaled_pos_embed pos_emb_random_crop_rate save_clip save_t5xxl split_mode "
           "num_last_block_to_freeze",
           "these scripts train Stable Diffusion 1 and 2, SDXL and Kandinsky 2.2, and no flow matching or EDM"),
    absent("controlnet controlnet_model_name_or_path control_net_lr conditioning_data_dir conditioning_image_column "
           "cond_image_column original_image_column edited_image_column edit_prompt_column cond_emb_dim",
           "these scripts train text-to-image models, and no ControlNet or image editing"),
    # Data
    absent("reg_data_dir prior_loss_weight with_prior_preservation class_data_dir class_prompt num_class_images "
           "prior_generation_precision real_prior sample_batch_size",
           "there are no regularisation images; images of the class can stand in the dataset like others"),
    absent("instance_prompt only_instance_prompt prepend_instance_prompt trigger_word",
           "captions come from the dataset; --repeats_from_folders takes those that are missing from a folder's name"),
    absent("caption_extension caption_extention caption_ext in_json dataset_class jsonl_for_train",
           "captions are read from a .txt file beside each image, or from metadata.jsonl, .csv or .parquet"),
    absent("caption_prefix caption_suffix caption_separator secondary_separator keep_tokens_separator enable_wildcard "
           "weighted_captions caption_tag_dropout_rate caption_dropout_every_n_epochs token_warmup_min "
           "token_warmup_step caption_strategy",
           "captions are taken as they are, apart from --caption_dropout, --shuffle_tags and --keep_tokens"),
    absent("dataset_repeats repeats num_repeats",
           "--repeats_from_folders takes repeats from the folders' names, and --train_data_config has them for each "
           "source"),
    absent("color_aug face_crop_aug_range", "images are changed by crops and by --random_flip alone"),
    absent("masked_loss masked_training alpha_mask masked_loss_probability unmasked_weight",
           "there are no masks: the loss is that of the complete image"),
    absent("bucket_no_upscale", "an image that is smaller than its training size is enlarged"),
    absent("persistent_data_loader_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch "
           "dataloader_prefetch_factor",
           "--dataloader_num_workers alone says how images are read ahead"),
    # Objective
    absent("min_timestep max_timestep min_noising_strength max_noising_strength",
           "every timestep may be drawn; in the scripts for SDXL --timestep_bias_strategy draws some more often"),
    absent("multires_noise_iterations multires_noise_discount perlin_noise adaptive_noise_scale "
           "noise_offset_random_strength ip_noise_gamma_random_strength noise_offset_probability "
           "input_perturbation_steps",
           "noise is changed by --noise_offset and, for Stable Diffusion, by --input_perturbation"),
    absent("loss_type huber_c huber_schedule huber_scale mse_strength mae_strength",
           "the loss is the mean squared error, which --snr_gamma can weight"),
    absent("debiased_estimation_loss scale_v_pred_loss_like_noise_pred v_pred_like_loss use_soft_min_snr snr_weight "
           "soft_min_snr_sigma_data loss_weight_fn",
           "the loss is weighted by --snr_gamma (min-SNR) alone"),
    # Optimizer
    absent("optimizer_args optimizer_config prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_steps "
           "prodigy_safeguard_warmup optimizer_schedulefree_wrapper schedulefree_wrapper_args",
           "an optimizer takes --adam_beta1, --adam_beta2, --adam_weight_decay and --adam_epsilon"),
    absent("use_lion_optimizer use_lion", "--help lists what --optimizer takes"),
    absent("lr_scheduler_type lr_scheduler_args lr_scheduler_timescale lr_scheduler_min_lr_ratio lr_decay_steps "
           "lr_end",
           "the learning rate follows --lr_scheduler, --lr_warmup_steps, --lr_num_cycles and --lr_power"),
    absent("lr_scale_sqrt", "--scale_lr multiplies by the number of images in a step, and nothing by its root"),
    absent("set_grads_to_none", "gradients are freed after each step without it"),
    absent("initial_epoch initial_step skip_until_initial_step",
           "--resume_from_checkpoint continues at the place in the data where the run was"),
    # Result and checkpoints
    absent("save_model_as use_safetensors no_safe_serialization save_as_full_pipeline lora_format",
           "results are safetensors in the layout of diffusers; --save_kohya_format in the scripts for LoRA adds the "
           "file that WebUI and ComfyUI read"),
    absent("output_name", "the result has the file names that diffusers looks for; --output_dir names its folder"),
    absent("no_metadata training_comment modelspec_comment metadata_title metadata_author metadata_description "
           "metadata_license metadata_tags",
           "README.md in --output_dir, the model card, is where a result is described"),
    absent("save_precision save_weight_dtype upcast_before_saving output_dtype",
           "weights are saved in the precision in which they are trained, usually float32"),
    absent("save_every_n_epochs save_n_epoch_ratio checkpoint_epoch_interval checkpointing_epochs",
           "--checkpointing_steps counts steps"),
    absent("save_state_on_train_end", "a checkpoint is written at the end without it"),
    # Validation
    absent("sample_sampler validation_scheduler validation_noise_scheduler",
           "validation images are drawn with the model's own sampler"),
    absent("validation_seed validation_randomize",
           "validation images are drawn from noise that follows from --seed, the same each time"),
    absent("validation_negative_prompt", "validation images are drawn without a negative prompt"),
    absent("validation_resolution", "validation images have the size of --resolution"),
    absent("max_validation_steps max_validation_batches num_eval_images",
           "--validation_split says how many images the validation loss is computed on"),
    absent("final_validation_prompt skip_final_inference validation_disable",
           "validation images are drawn at the end too, where there is a validation prompt"),
    absent("validation_image validation_images val_image_url val_image_url_or_path validation_using_datasets",
           "validation images are drawn from prompts alone"),
    # Speed and memory
    absent("sdpa mem_eff_attn flash_attention use_flash_attention attention_mechanism split_attn",
           "the scripts for PyTorch use its own attention (scaled_dot_product_attention) without it"),
    absent("no_half_vae upcast_vae vae_dtype vae_precision",
           "SDXL's VAE runs in float32 without it where half precision would overflow"),
    absent("vae_batch_size text_encoder_batch_size vae_encode_batch_size encode_batch_size "
           "dataset_preprocess_batch_size image_processing_batch_size",
           "frozen networks run on batches of --train_batch_size"),
    absent("cache_info skip_cache_check skip_latents_validity_check vae_cache_scan_behaviour",
           "--cache_latents and --cache_text_embeddings find what they hold by its content, without a check"),
    absent("lowram highvram blocks_to_swap double_blocks_to_swap single_blocks_to_swap cpu_offload_checkpointing "
           "enable_model_cpu_offload offload ramtorch enable_group_offload musubi_blocks_to_swap "
           "enable_vae_slicing enable_vae_tiling mem_eff_save vae_enable_slicing vae_enable_tiling",
           "docs/memory.md lists what saves memory"),
    absent("fp8_base fp8_base_unet do_fp8_training base_model_precision quantize quantize_via quantization_config "
           "base_weight_dtype bnb_quantization_config_path",
           "frozen networks have the precision of --mixed_precision, and none is quantized"),
    absent("full_fp16 fp16_master_weights_and_gradients",
           "weights are trained in float32, or with --full_bf16 in bfloat16"),
    absent("torch_compile compile", "accelerate launch --dynamo_backend inductor compiles the network"),
    absent("deepspeed deepspeed_config use_deepspeed zero_stage zero3_init_flag zero3_save_16bit_model "
           "offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path "
           "use_fsdp fsdp_version fsdp_enable multi_gpu num_processes num_machines machine_rank main_process_ip "
           "main_process_port num_cpu_threads_per_process gpu_ids dynamo_backend dynamo_mode "
           "dynamo_use_fullgraph dynamo_use_dynamic dynamo_use_regional_compilation accelerate_config",
           "what accelerate launch is told stands before the name of the script"),
    absent("ddp_gradient_as_bucket_view ddp_static_graph find_unused_parameters",
           "processes exchange gradients with the settings that the script chooses"),
    absent("disable_tf32", "TF32 is off without --allow_tf32"),
    # Logs and the hub
    absent("log_prefix log_config log_tracker_config wandb_run_name tracker_run_name wandb_entity",
           "trackers are told --tracker_project_name, and read their own environment variables, such as WANDB_ENTITY"),
    absent("wandb_api_key", "wandb reads WANDB_API_KEY, or what `wandb login` keeps"),
    absent("output_config", "every run writes its flags into run.yaml in --output_dir"),
    absent("use_auth_token", "`hf auth login` keeps the token"),
    absent("huggingface_repo_type huggingface_path_in_repo async_upload resume_from_huggingface "
           "push_to_hub_background",
           "the hub has --push_to_hub, --hub_model_id, --hub_private_repo and --push_checkpoints"),
)
# fmt: on


def instead_of(name: str) -> str | None:
    """What there is instead of another trainer's flag, or None where it is not in the table."""
    return next((row.instead for row in ABSENT if name in row.names), None)
