"""Flags about the base model and the dataset."""

from training_utils.cli.flag import Flag, Group, differs, needs
from training_utils.cli.packages import Package
from training_utils.cli.scripts import DECODERS, EVERY, JAX, KANDINSKY, PRIORS, SDXL, TORCH
from training_utils.cli.values import integer, multiple_of_8, number, path

INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")
TORCH_NPU = Package("torch_npu", pip="torch_npu", title="an Ascend NPU and torch_npu")
WITH_BUCKETS = needs("aspect_ratio_bucketing", refused=True, even_default=True)

# fmt: off
MODEL = Group("Base model", (
    Flag("pretrained_prior_model_name_or_path", path, "kandinsky-community/kandinsky-2-2-prior",
         "folder or hub id of the prior, which turns text into the embedding of an image, with CLIP's encoders",
         scripts=KANDINSKY, shapes_result=True),
    Flag("pretrained_decoder_model_name_or_path", path, "kandinsky-community/kandinsky-2-2-decoder",
         "folder or hub id of the decoder, which turns such an embedding into the image",
         scripts=KANDINSKY, shapes_result=True),
    Flag("prior_revision", str, None, "branch, tag or commit of a prior on the hub; pin one so that no later upload "
         "changes the run", scripts=KANDINSKY, shapes_result=True),
    Flag("decoder_revision", str, None, "branch, tag or commit of a decoder on the hub",
         scripts=KANDINSKY, shapes_result=True),
    Flag("pretrained_model_name_or_path", path, None, "folder or hub id of the model to start from", required=True,
         scripts=EVERY - KANDINSKY, shapes_result=True,
         other_names=("model", "base_model", "base_model_name", "model_name_or_path", "name_or_path", "model_path",
                      "pretrained_model")),
    Flag("revision", str, None, "branch, tag or commit of a hub model; pin one so that no later upload changes the "
         "run", scripts=EVERY - KANDINSKY, shapes_result=True, other_names=("base_revision", "model_revision")),
    Flag("variant", str, None, "which stored copy of the weights to read, for example fp16", shapes_result=True),
    Flag("cache_dir", path, None, "where downloads are kept; set it when the home folder is small",
         other_names=("tokenizer_cache_dir", "hf_cache_dir")),
    Flag("single_file_config", path, None, "where the model is one .safetensors file: folder of a model of the same "
         "kind, whose settings are taken; left out, they are fetched from the hub", scripts=EVERY - KANDINSKY),
    Flag("non_ema_revision", str, None, "revision of the UNet alone, where it lies in another branch",
         scripts=frozenset(["train_text_to_image"]), shapes_result=True),
    Flag("from_pt", bool, False, "accepted for old command lines: safetensors are read in any case", scripts=JAX),
    Flag("pretrained_vae_model_name_or_path", path, None, "another VAE; one that is safe in half precision saves time "
         "and memory, for example madebyollin/sdxl-vae-fp16-fix", scripts=SDXL, shapes_result=True,
         other_names=("vae", "vae_path", "vae_name_or_path", "vae_model_name_or_path", "pretrained_vae_name_or_path")),
    Flag("proportion_empty_prompts", number(0, 1), 0.0, "another name of --caption_dropout", scripts=SDXL,
         shapes_result=True, replaces=("caption_dropout",)),
    Flag("enable_npu_flash_attention", bool, False, "flash attention on Ascend NPUs", scripts=SDXL,
         package=TORCH_NPU),
))
DATA = Group("Data", (
    Flag("dataset_name", path, None, "hub id or local path that the datasets library can load", shapes_result=True,
         other_names=("dataset",)),
    Flag("dataset_config_name", str, None, "configuration of that dataset, where it has several", shapes_result=True),
    Flag("train_data_dir", path, None, "folder of images with metadata.jsonl, .csv or .parquet or a .txt caption "
         "beside each, of WebDataset's .tar shards, or of .parquet tables; with --dataset_name it is passed on as "
         "data_dir",
         other_names=("instance_data_dir", "data_dir", "train_dir", "image_dir", "image_folder", "folder_path",
                      "dataset_dir", "dataset_path", "train_shards_path_or_url"),
         variants=(differs(DECODERS, help="folder of images; captions are neither needed nor read; with "
                           "--dataset_name it is passed on as data_dir"),)),
    Flag("streaming", bool, False, "read .tar shards or .parquet tables where they lie, on the hub or in "
         "--train_data_dir, a few chunks at a time; for datasets that do not fit the disk", shapes_result=True),
    Flag("shuffle_buffer", integer(1), 10_000, "with --streaming: samples that are shuffled together; more are "
         "better mixed and take more room on the disk", shapes_result=True,
         needs=needs("streaming", refused=True, even_default=True)),
    Flag("train_data_config", path, None, "YAML file that names several datasets, repeated or weighted",
         other_names=("dataset_config with a YAML file", "data_backend_config with a YAML file",
                      "concepts_list with a YAML file", "concept_file_name with a YAML file"),
         not_streamed="names several datasets, and --streaming reads one"),
    Flag("repeats_from_folders", bool, False, "show the images in folders named like `10_sks dog` that many times an "
         "epoch (kohya's layout); images without a caption there get these words", shapes_result=True,
         not_streamed="shows the images of some folders again, and a stream has no folders"),
    Flag("image_column", str, "image", "column that holds the images"),
    Flag("caption_column", str, "text", "column that holds the captions: a string, or a list to draw one from",
         scripts=EVERY - DECODERS, other_names=("text_column", "prompt_column", "parquet_caption_column")),
    Flag("shuffle_tags", bool, False, "put a caption's tags, which commas separate, into a drawn order each time",
         scripts=EVERY - DECODERS, shapes_result=True,
         other_names=("shuffle_caption", "shuffle_tokens", "enable_tag_shuffling")),
    Flag("keep_tokens", integer(0), 0, "with --shuffle_tags: this many tags at the start stay where they are",
         scripts=EVERY - DECODERS, shapes_result=True, needs=needs("shuffle_tags", refused=True),
         other_names=("keep_tags_count",)),
    Flag("max_train_samples", integer(1), None, "train on this many images only, for a quick trial",
         shapes_result=True, other_names=("max_samples", "max_train_records")),
    Flag("resolution", multiple_of_8, 512, "side of the square training image in pixels, a multiple of 8",
         scripts=EVERY - PRIORS, shapes_result=True, variants=(differs(SDXL, default=1024),),
         other_names=("image_size", "img_size", "image_resolution", "train_resolution")),
    Flag("center_crop", bool, False, "always take the middle of the image instead of a random crop",
         scripts=EVERY - KANDINSKY, shapes_result=True,
         otherwise="the middle of an image is taken without it"),
    Flag("random_flip", bool, False, "mirror every second image; not for text or faces with a parting",
         shapes_result=True,
         other_names=("flip_aug", "flip_x", "hflip", "random_horizontal_flip", "enable_random_flip")),
    Flag("image_interpolation_mode", str, "lanczos", "filter that resizes the images", INTERPOLATIONS,
         scripts=EVERY - PRIORS, shapes_result=True, variants=(differs(DECODERS, default="bicubic"),),
         other_names=("resize_interpolation", "interpolation_type", "interpolation")),
    Flag("ignore_color_profiles", bool, False, "train on the stored numbers of images that have a color profile "
         "(Display P3, Adobe RGB, CMYK), instead of converting their colors to sRGB", shapes_result=True),
    Flag("random_crop", bool, False, "train on a random square of each image instead of its middle",
         scripts=DECODERS, shapes_result=True,
         otherwise="Stable Diffusion and SDXL train on drawn crops without it, and CLIP on the middle"),
    Flag("reducing_gap", number(1), 1.0, "how exactly large images are made smaller: 1 is quickest, 3 hardly "
         "differs from exact", scripts=DECODERS, shapes_result=True),
    Flag("caption_dropout", number(0, 1), 0.0, "share of samples whose caption is left empty, drawn again each epoch; "
         "0.1 keeps classifier-free guidance working in long runs", shapes_result=True,
         other_names=("caption_dropout_rate", "caption_dropout_probability", "conditioning_dropout_prob"),
         replaces=("proportion_empty_prompts",),
         variants=(differs(DECODERS, help="share of samples that are conditioned on no image, drawn again each epoch; "
                           "0.1 keeps classifier-free guidance working in long runs"),)),
    Flag("dataloader_num_workers", integer(0), 0, "processes that read images ahead; 0 reads in the training process",
         other_names=("max_data_loader_n_workers", "dataloader_workers", "num_workers"),
         variants=(differs(JAX, help="threads that read images ahead; 0 reads between the steps"),)),
    Flag("on_bad_sample", str, "error", "what a caption or image that cannot be used does: stop the run, or have it "
         "left out with a warning", ("error", "skip"),
         other_names=("delete_problematic_images skip", "ignore_missing_files skip")),
    Flag("check_data", bool, False, "only check every caption and image and print a report; needs no model",
         once=True, other_names=("debug_dataset",)),
    # The priors' is another flag of the same name: it does not size the training images.
    Flag("resolution", integer(1), 512, "side of the validation images, which the decoder rounds up to a multiple of "
         "64; CLIP's image processor sizes the training images", scripts=PRIORS, shapes_result=True),
))
BUCKETS = Group("Aspect ratios", (
    Flag("aspect_ratio_bucketing", bool, False, "train on images of many shapes, each about --resolution^2 pixels, "
         "instead of cutting all to squares; a batch holds images of one shape", scripts=TORCH - PRIORS,
         shapes_result=True,
         other_names=("enable_bucket", "use_aspect_ratio_buckets", "aspect_ratio_buckets"),
         not_streamed="needs the size of every image before the first step, which is to read them all"),
    Flag("min_bucket_reso", integer(8), None, "shortest side of a shape in pixels; left out, half of --resolution",
         scripts=TORCH - PRIORS, shapes_result=True, needs=WITH_BUCKETS),
    Flag("max_bucket_reso", integer(8), None, "longest side of a shape in pixels; left out, twice --resolution",
         scripts=TORCH - PRIORS, shapes_result=True, needs=WITH_BUCKETS),
    Flag("bucket_reso_steps", multiple_of_8, 64, "sides are multiples of this many pixels, itself a multiple of 8; "
         "smaller ones crop less and make more shapes, whose batches fill less well", scripts=TORCH - PRIORS,
         shapes_result=True, needs=WITH_BUCKETS, other_names=("aspect_bucket_alignment",)),
))
# fmt: on
GROUPS = (MODEL, DATA, BUCKETS)
