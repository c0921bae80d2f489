"""Reads and writes the folder of a part: config.json beside safetensors in diffusers' and transformers' layout.

Parameters are a nested dict of arrays as linen takes it; see networks.py for how its names follow from the file's.
Older layouts are read too: the `text_model.` level and the `position_ids` of older CLIP files, the first names of the
autoencoder's attention, and the msgpack files that Flax models were once published in. Pickles never are.
"""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from .networks import FLAX_ONLY, PARTS, ModelError

STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
MSGPACK = {"text_encoder": "flax_model", "unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Of a whole CLIP, stored where only its text encoder is needed.
NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def load_part(folder, part, dtype=jnp.float32, variant=None):
    """The module and the parameters of one part of a pipeline's folder.

    Args: folder, a local folder; part, "unet", "vae" or "text_encoder"; dtype, what the module computes in; variant,
    read the files of this variant ("fp16") where the part has them. Parameters are float32 numpy arrays whatever the
    type they are stored in. Raises ModelError, in a sentence that names the part.
    """
    folder = Path(folder) / part
    module = PARTS[part].from_config(read_config(folder, part), dtype)
    files = weight_files(folder, part, variant)
    tensors = read_msgpack(files[0], part) if files[0].suffix == ".msgpack" else read_safetensors(files, part)
    return module, to_params(module, tensors)


def save_part(folder, part, params, config, name=None):
    """Write config.json and safetensors of one part into folder/name, by default folder/part, as diffusers or
    transformers write them.

    Args: params, nested dict of arrays, stored in the type that they have; config, a mapping. Raises ModelError when
    the parameters are not those of a network of this configuration.
    """
    from safetensors.numpy import save_file

    folder = Path(folder) / (name or part)
    module = PARTS[part].from_config(config)
    tensors = to_tensors(module, params)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in config.items() if name not in FLAX_ONLY}
    if "_class_name" in settings:
        settings["_class_name"] = settings["_class_name"].removeprefix("Flax")
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / f"{STEMS[part]}.safetensors", metadata={"format": "pt"})


def copy_part(source, folder, part, params, variant=None):
    """Copy a part from one pipeline's folder into another's if its weights are `params`; returns whether it did.

    Its bytes stay, and so does its precision. A variant loses its tag. Not copied are weights in several files or in
    msgpack.
    """
    source, folder = Path(source) / part, Path(folder) / part
    try:
        (file,) = files = weight_files(source, part, variant)
    except ValueError:  # no weights any more, or several files
        return False
    if file.suffix != ".safetensors":
        return False
    stored = to_params(PARTS[part].from_config(read_config(source, part)), read_safetensors(files, part))
    given, stored = flatten_dict(params), flatten_dict(stored)
    if given.keys() != stored.keys() or not all(np.array_equal(given[path], stored[path]) for path in stored):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for path, name in ((source / "config.json", "config.json"), (file, f"{STEMS[part]}.safetensors")):
        if path.resolve() != (folder / name).resolve():  # a pipeline may be saved where it came from
            shutil.copyfile(path, folder / name)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_config(folder, part):
    """config.json of a part's folder, a dict. Raises ModelError."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ModelError(f"{part}: {folder} has no config.json; it must be a folder in diffusers' layout") from None
    except ValueError as error:
        raise ModelError(f"{part}: {folder / 'config.json'} is not valid JSON: {error}") from None


def file_patterns(part, variant=None):
    """Names of the files that may hold a part's weights, most wanted first: those of the variant, then the plain ones,
    then Flax's msgpack. For each, patterns of a whole file, of an index of several, and of those."""
    stem = STEMS[part]
    for tag in [f".{variant}", ""] if variant else [""]:
        yield (
            f"{stem}{tag}.safetensors",
            f"{stem}.safetensors.index{tag}.json",
            f"{stem}-?????-of-?????{tag}.safetensors",
        )
    yield (f"{MSGPACK[part]}.msgpack",)


def has_weights(folder, part, variant=None):
    """Whether a part's folder holds weights that `weight_files` finds."""
    try:
        return bool(weight_files(folder, part, variant))
    except ModelError:
        return False


def weight_files(folder, part, variant=None):
    """The files that hold the weights of a part: those of the variant, else the plain ones, else Flax's msgpack.

    Raises ModelError where there are none, or only pickles.
    """
    for whole, *several in file_patterns(part, variant):
        if (folder / whole).is_file():
            return [folder / whole]
        if several and (folder / several[0]).is_file():
            return _indexed_files(folder, part, several[0])
    if variants := sorted(folder.glob(f"{STEMS[part]}.*.safetensors")):
        raise ModelError(f"{part}: {folder} holds only the variant {variants[0].name}; ask for that variant")
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
    found = "only pickled weights" if pickled else f"no {STEMS[part]}.safetensors"
    raise ModelError(
        f"{part}: {folder} holds {found}; pickled weights could run code and are not read: convert them once where "
        'torch is installed, StableDiffusionPipeline.from_pretrained("MODEL").save_pretrained("FOLDER")'
    )


def _indexed_files(folder, part, index):
    """The files that an index names. Raises ModelError when one is not there."""
    try:
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise ModelError(f"{part}: {folder / index} is no index of weights") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{part}: {index} names {name}, which is not in {folder}")
    return [folder / name for name in names]


def read_safetensors(files, part):
    """The tensors of safetensors files, {name: numpy array}, in the type they are stored in. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{part}: {path} cannot be read: {error}") from None
    return tensors


def read_msgpack(path, part):
    """The tensors of an old Flax file under today's names and in torch's layout, {name: numpy array}.

    Those modules were named `down_blocks_0`, where the safetensors file says `down_blocks.0`.
    """
    try:
        tree = flatten_dict(serialization.msgpack_restore(path.read_bytes()))
    except Exception as error:  # msgpack's own kinds, and flax's
        raise ModelError(f"{part}: {path} cannot be read: {str(error) or type(error).__name__}") from None
    tensors = {}
    for names, array in tree.items():
        module = [name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name) for name in names[:-1]]
        tensors[".".join([*module, LEAVES.get(names[-1], names[-1])])] = _to_torch(names[-1], np.asarray(array))
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Names and layouts
# ---------------------------------------------------------------------------------------------------------------------

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}  # linen's word: the file's


def _key(names):
    """The name in the file of a parameter whose path in the tree is `names`."""
    return ".".join([*names[:-1], LEAVES.get(names[-1], names[-1])])


def _to_torch(leaf, array):
    """A parameter as torch stores it: convolutions (H, W, in, out) become (out, in, H, W), matrices are turned."""
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(leaf, array):
    """The inverse of `_to_torch`."""
    if leaf != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _today(part, name):
    """The name that today's libraries give a tensor, None for one that the network does not need."""
    if part == "text_encoder":
        name = name.removeprefix("text_model.")
        return None if name.startswith(NOT_TEXT) or name.endswith("position_ids") else name
    if part == "vae" and ".attentions." in name:
        module, _, leaf = name.rpartition(".")
        head, _, last = module.rpartition(".")
        return f"{head}.{OLD_ATTENTION.get(last, last)}.{leaf}"
    return name


def tensor_shapes(module):
    """Names and shapes of a module's tensors in a file, {name: shape}; a text encoder's without `text_model.`"""
    return {_key(path): _torch_shape(path[-1], like.shape) for path, like in flatten_dict(module.shapes()).items()}


def to_params(module, tensors):
    """The parameter tree of a module, float32 numpy arrays, from a file's tensors {name: array of any float type}.

    Raises ModelError when a tensor is missing, has another shape, or is one that the module does not have.
    """
    part = module.part
    named = {_today(part, name): array for name, array in tensors.items()}
    named.pop(None, None)
    params = {}
    for path, (name, shape) in zip(flatten_dict(module.shapes()), tensor_shapes(module).items(), strict=True):
        if name not in named:
            raise ModelError(f"{part}: the weights lack {name}, which a network of this configuration has")
        array = named.pop(name)
        if part == "vae" and array.shape == (*shape, 1, 1):  # the first autoencoders: 1x1 convolutions
            array = array[:, :, 0, 0]
        if array.shape != shape:
            raise ModelError(f"{part}: {name} has shape {array.shape}, where the configuration asks for {shape}")
        params[path] = np.ascontiguousarray(_from_torch(path[-1], array), dtype=np.float32)
    if named:
        raise ModelError(f"{part}: the weights hold {min(named)}, which a network of this configuration does not have")
    return unflatten_dict(params)


def to_tensors(module, params):
    """A parameter tree as a file's tensors, {name: numpy array in torch's layout}. Raises ModelError like to_params.

    The text encoder's names get the `text_model.` level: transformers 4 needs it and 5 reads both.
    """
    part, level = module.part, "text_model." if module.part == "text_encoder" else ""
    shapes, tensors = flatten_dict(module.shapes()), {}
    flat = flatten_dict(params)
    if different := set(shapes) ^ set(flat):
        raise ModelError(f"{part}: {_key(min(different))} is either missing or not a parameter of this configuration")
    for path, like in shapes.items():
        if flat[path].shape != like.shape:
            hint = "; params that are replicated must go through flax.jax_utils.unreplicate first"
            replicated = flat[path].shape[1:] == like.shape
            raise ModelError(
                f"{part}: {_key(path)} has shape {flat[path].shape}, not {like.shape}{hint if replicated else ''}"
            )
        tensors[level + _key(path)] = np.ascontiguousarray(_to_torch(path[-1], np.asarray(flat[path])))
    return tensors


def _torch_shape(leaf, shape):
    if leaf != "kernel":
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
