"""Base models with one thing wrong, and what is said of each: for torch and JAX."""

import json
import shutil

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from make_base import build_tokenizer
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer, XLMRobertaConfig, XLMRobertaModel

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def edit(path, **changes):
    """Change settings in a JSON file; None removes one."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def weights(base, part):
    (file,) = (base / part).glob("*.safetensors")
    return file


def change_weights(base, part, change):
    file = weights(base, part)
    save_file(change(load_file(file)), file, {"format": "pt"})


def lose(base, part, words):
    """Take the first weight with these words in its name out of a part's file."""
    lost = next(name for name in load_file(weights(base, part)) if words in name)
    change_weights(base, part, lambda tensors: {name: value for name, value in tensors.items() if name != lost})


def under_module(base, part):
    change_weights(base, part, lambda tensors: {f"module.{name}": value for name, value in tensors.items()})


def other_text_encoder(base):
    shutil.rmtree(base / "text_encoder")
    sides = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    XLMRobertaModel(XLMRobertaConfig(vocab_size=60, **sides)).save_pretrained(base / "text_encoder")


def old_tokenizer(base):
    """The tokenizer as Stable Diffusion has it on the hub: vocab.json and merges.txt."""
    shutil.rmtree(base / "tokenizer")
    (base / "tokenizer").mkdir()
    build_tokenizer().backend_tokenizer.model.save(str(base / "tokenizer"))
    config = {"model_max_length": 16, "tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (base / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))


def without_file(name):
    def change(base):
        old_tokenizer(base)
        (base / "tokenizer" / name).unlink()

    return change


def with_text(name, text):
    def change(base):
        old_tokenizer(base)
        (base / "tokenizer" / name).write_text(text)

    return change


def bert(base):
    for file in (base / "tokenizer").iterdir():
        file.unlink()
    (base / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    (base / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}')


def added_word(base):
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(base / "tokenizer")


def pointer(path):
    return lambda base: (base / path).write_text(POINTER)


def only_variant(*variants):
    def change(base):
        file = weights(base, "unet")
        content = file.read_bytes()
        file.unlink()
        for variant in variants:
            file.with_suffix(f".{variant}.safetensors").write_bytes(content)

    return change


def missing_shard(base):
    file = weights(base, "vae")
    index = {"weight_map": dict.fromkeys(load_file(file), "part-1-of-1.safetensors")}
    file.unlink()
    (base / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def add_safety_checker(folder):
    """A tiny safety checker and its image processor, in a model's folder."""
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    config = CLIPConfig(
        text_config=small | {"vocab_size": 60},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sides).save_pretrained(folder / "feature_extractor")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],  # as the first releases called it
    )


def pickle_safety_checker(base):
    torch.save({}, base / "safety_checker" / "pytorch_model.bin")
    (base / "safety_checker" / "model.safetensors").unlink()


def setting(path, **changes):
    return lambda base: edit(base / path, **changes)


UNET, VAE, TEXT, TOKENS = "unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/"
BROKEN = {
    "another text encoder": (other_text_encoder, "'text_encoder' of base model .* is a XLMRobertaModel; .* CLIPText"),
    "another model type": (setting(TEXT, model_type="siglip_text_model"), "this script needs a CLIPTextModel there"),
    "a tiny autoencoder": (
        setting(VAE, _class_name="AutoencoderTiny"),
        "'vae' .* is a AutoencoderTiny; .* AutoencoderKL",
    ),
    "another UNet": (setting(UNET, _class_name="UNet3DConditionModel"), "'unet' .* is a UNet3DConditionModel"),
    "unCLIP": (
        setting(UNET, class_embed_type="projection"),
        "has class_embed_type 'projection', .* text-to-image model",
    ),
    "classes": (setting(UNET, num_class_embeds=1000), "has num_class_embeds 1000"),
    "an added embedding": (setting(UNET, addition_embed_type="text_time"), "has addition_embed_type 'text_time'"),
    "an image adapter": (setting(UNET, encoder_hid_dim_type="ip_image_proj"), "has encoder_hid_dim_type"),
    "another width": (setting(UNET, cross_attention_dim=24), "do not belong together: its UNet takes 24 .* given 16"),
    "no vocabulary": (without_file("vocab.json"), "'tokenizer' .* is missing vocab.json"),
    "no merges": (without_file("merges.txt"), "'tokenizer' .* is missing merges.txt"),
    "empty merges": (with_text("merges.txt", "#version: 0.2\n"), "merges.txt is empty"),
    "empty vocabulary": (with_text("vocab.json", "{}"), "has no vocabulary: .*vocab.json is empty"),
    "pointer as vocabulary": (with_text("vocab.json", POINTER), "vocab.json is a pointer of git-lfs"),
    "pointer as merges": (with_text("merges.txt", POINTER), "merges.txt is a pointer of git-lfs"),
    "an empty tokenizer.json": (setting(TOKENS + "tokenizer.json", model={"type": "BPE"}), "has no vocabulary"),
    "half a tokenizer.json": (lambda base: (base / TOKENS / "tokenizer.json").write_text("{"), "cannot be read"),
    "another tokenizer": (bert, "'tokenizer' .* is a BertTokenizer; this script needs a CLIPTokenizer there"),
    "a word too many": (added_word, "the word '<cat-toy>' has the number .*, and 'text_encoder' has"),
    "no length": (setting(TOKENS + "tokenizer_config.json", model_max_length=None), '"model_max_length": 16 into'),
    "a pointer as weights": (pointer("vae/diffusion_pytorch_model.safetensors"), "git lfs pull"),
    "a pointer as settings": (pointer(UNET), "git lfs pull"),
    "only fp16": (only_variant("fp16"), "'unet' .* has weights of a variant only; add --variant fp16"),
    "two variants": (only_variant("fp16", "non_ema"), "add --variant fp16 or --variant non_ema"),
    "a missing shard": (missing_shard, "'vae' .* is missing part-1-of-1.safetensors, which its .*index.json lists"),
}
# Networks whose files are not complete: the words are torch's, JAX's networks have their own.
INCOMPLETE = {
    "a layer of the text encoder": (
        lambda base: lose(base, "text_encoder", "layers.0"),
        "'text_encoder' .* is missing weights: ",
    ),
    "a weight of the UNet": (lambda base: lose(base, "unet", "conv_in"), "'unet' .* is missing weights: conv_in"),
    "a weight of the VAE": (lambda base: lose(base, "vae", "quant_conv"), "'vae' .* is missing weights: "),
    "DDP's names": (
        lambda base: under_module(base, "text_encoder"),
        "is missing weights: .* stored with `module.`",
    ),
    "DDP's names of a UNet": (
        lambda base: under_module(base, "unet"),
        "is missing weights: .* stored with `module.`",
    ),
    "a weight too many": (
        lambda base: change_weights(base, "unet", lambda tensors: tensors | {"add_embedding.bias": torch.ones(9)}),
        "'unet' .* has no place for weights of its file, .* another's: add_embedding.bias",
    ),
    "a LoRA that is loaded": (
        lambda base: change_weights(
            base,
            "unet",
            lambda tensors: {name.replace("to_q.", "to_q.base_layer."): value for name, value in tensors.items()},
        ),
        "saved with a LoRA loaded in it: unload or fuse that",
    ),
}
