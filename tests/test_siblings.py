"""What must stand in several scripts stands there alike, and a sibling differs by what it is for."""

import difflib
import inspect

import pytest

import train_text_to_image
import train_text_to_image_decoder
import train_text_to_image_flax
import train_text_to_image_lora
import train_text_to_image_lora_decoder
import train_text_to_image_lora_prior
import train_text_to_image_lora_sdxl
import train_text_to_image_prior
import train_text_to_image_sdxl

SAME = [
    (train_text_to_image, train_text_to_image_flax, ["SampleTransform"]),
    (
        train_text_to_image,
        train_text_to_image_lora,
        ["SampleTransform", "encode_images", "encode_captions", "training_loss"],
    ),
    (
        train_text_to_image_sdxl,
        train_text_to_image_lora_sdxl,
        [
            *("encode_images", "encode_captions", "text_of", "training_loss"),
        ],
    ),
    (
        train_text_to_image_prior,
        train_text_to_image_lora_prior,
        [
            *("SampleTransform", "encode_images", "encode_captions", "training_loss"),
        ],
    ),
    (
        train_text_to_image_decoder,
        train_text_to_image_lora_decoder,
        ["SampleTransform", "encode_images", "training_loss"],
    ),
]
OTHERS = [
    *(train_text_to_image_lora, train_text_to_image_sdxl, train_text_to_image_lora_sdxl, train_text_to_image_prior),
    *(train_text_to_image_lora_prior, train_text_to_image_decoder, train_text_to_image_lora_decoder),
]


@pytest.mark.parametrize(("one", "two", "names"), SAME)
def test_passages_that_are_the_same(one, two, names):
    for name in names:
        assert inspect.getsource(getattr(one, name)) == inspect.getsource(getattr(two, name)), name


@pytest.mark.parametrize("script", OTHERS)
def test_the_end_of_a_step_is_the_same_in_every_script(script):
    """From the optimizer step to the end of the loop."""
    assert end_of_step(script) == end_of_step(train_text_to_image)


def end_of_step(script):
    return inspect.getsource(script.main).split("# Same in every script", 1)[1].split("if run.ended_early")[0]


@pytest.mark.parametrize(("one", "two"), [pair[:2] for pair in SAME if "lora" in pair[1].__name__])
def test_lora_differs_from_full_fine_tuning_by_lora(one, two):
    """The difference stays readable: it is meant to read like a release note."""
    one, two = (inspect.getsource(module).splitlines() for module in (one, two))
    changed = [line for line in difflib.ndiff(one, two) if line[0] in "+-"]
    assert len(changed) < 130
