"""What a viewer shows of an image is what is trained: its colors, its orientation, its range of numbers; and no odd
tag or long text makes a good image unusable."""

import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT, result_bytes
from PIL import Image, ImageCms, PngImagePlugin
from tiny import image, write_images

from training_utils import cli
from training_utils.base.errors import UserError
from training_utils.cli.options import BucketLimits, DataOptions
from training_utils.cli.scripts import SCRIPTS
from training_utils.data import buckets, checking, color, image_ops, inspection, opening, plug_ins
from training_utils.data.image_files import UnusableImage, open_image
from training_utils.data.plug_ins import PLUG_INS

D50 = (0.9642, 1, 0.8249)
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def xyz(numbers):
    return b"XYZ \0\0\0\0" + fixed(*numbers)


def gamma(exponent):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256)) + b"\0\0"


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def assembled(space, tags, kind=b"mntr", pcs=b"XYZ "):
    """An ICC profile of some tags."""
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(D50)} | tags
    table = b""
    body = b""
    start = 128 + 4 + 12 * len(tags)
    for sign, content in tags.items():
        content += bytes(-len(content) % 4)
        table += sign + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4s4B4s4s4s", start + len(body), b"lcms", 2, 16, 0, 0, kind, space, pcs)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acspAPPL" + bytes(28) + fixed(*D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(primaries, curve):
    names = zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries))
    return assembled(b"RGB ", dict(names) | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def cmyk_profile():
    """Of inks that darken: Lab with L from 0 (all ink) to 100, on a grid of two nodes a channel."""
    nodes = b""
    for node in range(16):
        cyan, magenta, yellow, black = ((node >> shift) & 1 for shift in (3, 2, 1, 0))
        light = 0 if black else 100 - 20 * (cyan + magenta + yellow)
        nodes += bytes([round(light * 2.55), 128 + 40 * (magenta - cyan), 128 + 60 * (yellow - cyan * magenta)])
    identity = struct.pack(">9i", *(65536 if at % 4 == 0 else 0 for at in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + nodes + ramp * 3
    return assembled(b"CMYK", {b"A2B0": lut}, kind=b"prtr", pcs=b"Lab ")


DISPLAY_P3 = rgb_profile(P3, SRGB_CURVE)
ADOBE_RGB = rgb_profile(ADOBE, gamma(2.19921875))
LINEAR_GREY = assembled(b"GRAY", {b"kTRC": gamma(1.0)})
BUILT_IN_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
OTHER_SRGB = rgb_profile(SRGB, SRGB_CURVE)

COLORS = image(5, (64, 48))
GREY = COLORS.convert("L")


def stored(original, kind="PNG", **options):
    content = io.BytesIO()
    original.save(content, kind, **options)
    return content.getvalue()


def seen(content, ignore_profile=False):
    """What a network sees of the bytes of an image: int, shape (H, W, 3)."""
    with open_image({"bytes": content}) as opened:
        return np.asarray(image_ops.upright_rgb(opened, ignore_profile)).astype(int)


def by_littlecms(original, profile):
    """A PIL image in sRGB, as Pillow's own procedure converts it."""
    source = io.BytesIO(profile)
    converted = ImageCms.profileToProfile(original, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.asarray(converted).astype(int)


# --- colors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [DISPLAY_P3, ADOBE_RGB], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "JPEG"])
def test_colors_of_a_profile_become_srgb(profile, kind):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = stored(COLORS, kind, icc_profile=profile, **lossless)
    with Image.open(io.BytesIO(content)) as opened:
        numbers = opened.convert("RGB")
    assert seen(content).tolist() == by_littlecms(numbers, profile).tolist()
    assert seen(content, ignore_profile=True).tolist() == np.asarray(numbers).tolist() != seen(content).tolist()


def test_a_red_of_display_p3_has_the_numbers_that_viewers_show():
    """(219, 37, 49), computed by hand from the primaries and a gamma of 2.2."""
    red = Image.new("RGB", (8, 8), (200, 60, 60))
    content = stored(red, icc_profile=rgb_profile(P3, gamma(2.2)))
    assert np.abs(seen(content)[4, 4] - (219, 37, 49)).max() <= 1


@pytest.mark.parametrize("profile", [BUILT_IN_SRGB, OTHER_SRGB], ids=["LittleCMS", "another program's"])
@pytest.mark.parametrize("original", [COLORS, GREY, COLORS.convert("P")], ids=["RGB", "L", "P"])
def test_a_profile_of_srgb_changes_no_number(profile, original):
    content = stored(original, icc_profile=profile)
    assert seen(content).tolist() == np.asarray(original.convert("RGB")).tolist()
    with open_image({"bytes": content}) as opened:
        assert image_ops.variant(opened, False) == "" and not color.is_unusable(opened)


def test_colors_of_a_palette_and_behind_transparency():
    palette = COLORS.quantize(40)
    want = by_littlecms(palette.convert("RGB"), DISPLAY_P3)
    assert seen(stored(palette, icc_profile=DISPLAY_P3)).tolist() == want.tolist()
    clear = COLORS.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    alpha = np.asarray(clear.getchannel("A"))[..., None] / 255
    want = by_littlecms(COLORS, DISPLAY_P3) * alpha + 255 * (1 - alpha)
    assert np.abs(seen(stored(clear, icc_profile=DISPLAY_P3)) - want).max() <= 1
    # The ground is white as it is, and not in the colors of the profile.
    nothing = Image.new("RGBA", (4, 4), (200, 60, 60, 0))
    assert (seen(stored(nothing, icc_profile=DISPLAY_P3)) == 255).all()


def grey_originals():
    sixteen = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    with_alpha = GREY.convert("LA")
    return {"L": GREY, "LA": with_alpha, "I;16": sixteen}


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
@pytest.mark.parametrize("profile", [LINEAR_GREY, ADOBE_RGB], ids=["grey", "RGB"])
def test_grey_images_with_a_profile(mode, profile):
    """An RGB profile in a grey image, which many programs write, says what its levels mean."""
    original = GREY if profile == LINEAR_GREY else GREY.convert("RGB")
    content = stored(grey_originals()[mode], icc_profile=profile)
    assert seen(content).tolist() == by_littlecms(original, profile).tolist()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_what_is_printed(kind):
    inks = Image.merge("CMYK", [Image.linear_gradient("L").resize((64, 48)).rotate(90 * at) for at in range(4)])
    content = stored(inks, kind, icc_profile=cmyk_profile())
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == "CMYK"
        want = by_littlecms(opened, cmyk_profile())
        naive = np.asarray(opened.convert("RGB")).astype(int)
    assert seen(content).tolist() == want.tolist() and np.abs(want - naive).mean() > 10
    assert seen(stored(inks, kind)).tolist() == seen(content, ignore_profile=True).tolist() == naive.tolist()


def test_lab_is_read():
    rgb = image(3, (8, 8)).resize((64, 48), Image.Resampling.BICUBIC)
    srgb = ImageCms.createProfile("sRGB")
    lab = ImageCms.profileToProfile(rgb, srgb, ImageCms.createProfile("LAB"), outputMode="LAB")
    for ignored in (False, True):
        difference = np.abs(seen(stored(lab, "TIFF"), ignored) - np.asarray(rgb))
        assert difference.mean() < 2  # Lab of 8 bits has steps of about one level


UNUSABLE = {
    "not a profile": (COLORS, b"no profile"),
    "cut off": (COLORS, DISPLAY_P3[:200]),
    "empty table": (COLORS, assembled(b"RGB ", {})),
    "grey for color": (COLORS, LINEAR_GREY),
    "CMYK for color": (COLORS, cmyk_profile()),
    "CMYK for grey": (GREY, cmyk_profile()),
    "RGB for CMYK": (COLORS.convert("CMYK"), DISPLAY_P3),
    "Lab": (COLORS, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_profile_that_cannot_be_used_is_counted_and_the_image_taken_as_it_is(tmp_path, capsys, what):
    original, profile = UNUSABLE[what]
    (tmp_path / "0.tif").write_bytes(stored(original, "TIFF", icc_profile=profile))
    (tmp_path / "0.txt").write_text("x")
    assert seen((tmp_path / "0.tif").read_bytes()).tolist() == np.asarray(original.convert("RGB")).tolist()
    assert inspection.check_data(DataOptions(folder=str(tmp_path)), 16) == 0
    assert "a color profile that cannot be used, which are taken for sRGB: 1\n      0.tif" in capsys.readouterr().out


def test_bytes_of_a_profile_may_be_anything():
    """Of a profile in which bytes are changed, the image is converted or taken as it is."""
    draws = np.random.default_rng(1)
    for _ in range(150):
        profile = bytearray(DISPLAY_P3 if draws.random() < 0.8 else LINEAR_GREY)
        for at in draws.integers(0, len(profile), draws.integers(1, 6)):
            profile[at] = draws.integers(256)
        assert seen(stored(Image.new("RGB", (4, 4), (9, 99, 199)), icc_profile=bytes(profile))).shape == (4, 4, 3)


def with_profiles(folder, profile):
    """The ten images, each with a profile."""
    write_images(folder)
    for index in range(10):
        image(index).save(folder / f"{index}.png", icc_profile=profile)
    return folder


def test_a_run_trains_on_converted_colors_in_workers_too(run, images, tmp_path):
    """Images whose numbers are those of the conversion train to the same weights; ignored, as if without profile."""
    few = ["--max_train_steps", "2"]
    wide = with_profiles(tmp_path / "wide", DISPLAY_P3)
    converted = with_profiles(tmp_path / "converted", None)
    for index in range(10):
        pixels = by_littlecms(image(index), DISPLAY_P3).astype(np.uint8)
        Image.fromarray(pixels).save(converted / f"{index}.png")
    run(tmp_path / "one", *few, "--train_data_dir", wide, "--dataloader_num_workers", "2")
    run(tmp_path / "two", *few, "--train_data_dir", converted)
    assert result_bytes(tmp_path / "one") == result_bytes(tmp_path / "two")
    run(tmp_path / "three", *few, "--train_data_dir", wide, "--ignore_color_profiles", "--dataloader_num_workers", "1")
    run(tmp_path / "four", *few, "--train_data_dir", images)
    assert result_bytes(tmp_path / "three") == result_bytes(tmp_path / "four") != result_bytes(tmp_path / "one")


def test_keys_of_caches_tell_apart_what_is_shown_otherwise(tmp_path):
    """What is shown as ever keeps its key, so that caches that were made before colors were converted stay valid."""
    originals = {"plain": None, "srgb": BUILT_IN_SRGB, "p3": DISPLAY_P3, "broken": b"x"}
    for name, profile in originals.items():
        (tmp_path / f"{name}.png").write_bytes(stored(COLORS, icc_profile=profile))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    keys = {}
    for ignored in (False, True):
        options = DataOptions(folder=str(tmp_path), caption_column=None, ignore_color_profiles=ignored)
        rows = opening.load_dataset(options).select([0, 1, 2, 3, 4]).drop([])
        keys[ignored] = {rows.name(at).split("/")[-1]: rows.digest_and_size(at)[0][64:] for at in range(5)}
    assert keys[True] == dict.fromkeys(["plain.png", "srgb.png", "p3.png", "broken.png"], "") | {"float.tif": " float"}
    assert keys[False] == keys[True] | {"p3.png": " sRGB"}


def test_cached_latents_follow_the_flag(run, tmp_path):
    wide = with_profiles(tmp_path / "wide", DISPLAY_P3)
    flags = ["--max_train_steps", "2", "--train_data_dir", wide, "--center_crop"]
    for name, more in {"converted": [], "ignored": ["--ignore_color_profiles"]}.items():
        run(tmp_path / name, *flags, *more)
        cache = ["--cache_latents", "--encoding_cache_dir", tmp_path / "cache"]  # the same for both
        run(tmp_path / f"{name} cached", *flags, *more, *cache)
        assert result_bytes(tmp_path / name) == result_bytes(tmp_path / f"{name} cached")


def test_a_report_counts_what_is_converted_or_ignored(tmp_path, capsys):
    with_profiles(tmp_path, DISPLAY_P3)
    assert inspection.check_data(DataOptions(folder=str(tmp_path)), 16) == 0
    assert "a color profile other than sRGB, which are converted to it: 10\n" in capsys.readouterr().out
    assert inspection.check_data(DataOptions(folder=str(tmp_path), ignore_color_profiles=True), 16) == 0
    assert "a color profile that is ignored (--ignore_color_profiles): 10\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_flag(tmp_path, script):
    folder = with_profiles(tmp_path / "wide", DISPLAY_P3)
    for flags, want in (
        ([], by_littlecms(image(0), DISPLAY_P3)),
        (["--ignore_color_profiles"], np.asarray(image(0))),
    ):
        args = cli.parse(["--train_data_dir", str(folder), "--check_data", *flags], script, "a script")
        assert np.asarray(opening.load_dataset(args.data).image(0)).tolist() == want.tolist()
        assert args.shapes_result["ignore_color_profiles"] == bool(flags)


def test_every_kind_of_dataset_is_told(tmp_path, parquet_of_wide_images):
    folder = with_profiles(tmp_path / "wide", DISPLAY_P3)
    (tmp_path / "data.yaml").write_text("- path: wide\n")
    sources = [
        {"folder": str(folder)},
        {"config": str(tmp_path / "data.yaml")},
        {"folder": parquet_of_wide_images},
        {"folder": parquet_of_wide_images, "shuffle_buffer": 8},
    ]
    for ignored in (False, True):
        want = np.asarray(image(0)) if ignored else by_littlecms(image(0), DISPLAY_P3)
        for source in sources:
            options = DataOptions(**source, cache_dir=str(tmp_path / "cache"), ignore_color_profiles=ignored)
            rows = opening.load_dataset(options).select([0])
            assert np.asarray(rows.image(0)).tolist() == want.tolist(), source


@pytest.fixture
def parquet_of_wide_images(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "table").mkdir()
    content = [stored(image(index), icc_profile=DISPLAY_P3) for index in range(3)]
    table = pyarrow.table({"image": content, "text": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "train.parquet")
    return str(tmp_path / "table")


# --- numbers of many bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("brightest", "want"), [(1, 255), (0.5, 128), (1.3, 255), (200, 200), (255, 255)])
def test_white_of_a_float_image(brightest, want):
    values = np.tile(np.linspace(0, brightest, 64, dtype=np.float32), (8, 1))
    assert seen(stored(Image.fromarray(values), "TIFF")).max() == want


def test_a_float_image_of_eight_bit_levels_has_these_levels():
    levels = np.arange(256, dtype=np.float32).reshape(16, 16)
    for values in (levels, levels / 255, (levels / 255).astype(np.float64).astype(np.float32)):
        assert seen(stored(Image.fromarray(values), "TIFF"))[..., 0].tolist() == levels.tolist()
    assert seen(stored(Image.fromarray(levels * 257), "TIFF"))[..., 0].tolist() == levels.tolist()


def test_numbers_that_are_none(recwarn):
    values = np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf, -1, 0.25]], np.float32)
    got = seen(stored(Image.fromarray(values), "TIFF"))[0, :, 0]
    assert got.tolist() == [0, 128, 255, 0, 255, 0, 0, 64]
    assert not [warning for warning in recwarn if "cast" in str(warning.message)]


# --- tags and texts --------------------------------------------------------------------------------------------------


def exif_block(*entries):
    """EXIF of entries (tag, type, count, four bytes)."""
    lines = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + lines + bytes(4)


TURNED = (0x112, 3, 1, b"\6\0\0\0")
ODD_TAGS = {
    "YCbCrPositioning as text": (0x213, 2, 2, b"1\0\0\0"),
    "ResolutionUnit as a fraction": (0x128, 5, 1, struct.pack("<I", 9999)),
    "XResolution as text": (0x11A, 2, 3, b"72\0\0"),
    "negative ExifIFD": (0x8769, 9, 1, struct.pack("<i", -5)),
    "GPS far away": (0x8825, 4, 1, struct.pack("<I", 10**9)),
    "unknown type": (0x10F, 99, 7, b"abcd"),
    "count without end": (0x10F, 2, 2**31, b"\0\0\0\0"),
    "software as double": (0x131, 12, 1, struct.pack("<I", 8)),
}


def with_exif(kind, block):
    if kind == "JPEG":
        raw = stored(COLORS, "JPEG")
        return raw[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + raw[2:]
    return stored(COLORS, kind, exif=block, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("what", ODD_TAGS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_odd_tag_is_no_damage(kind, what):
    upright = seen(stored(COLORS, kind, **({"lossless": True} if kind == "WEBP" else {})))
    for entries in ((TURNED, ODD_TAGS[what]), (ODD_TAGS[what], TURNED)):
        content = with_exif(kind, exif_block(*entries))
        assert seen(content).tolist() == np.rot90(upright, -1).tolist()
        with open_image({"bytes": content}) as opened:
            assert image_ops.upright_size(opened) == (48, 64)


def test_an_odd_tag_of_a_tiff_is_no_damage():
    """A TIFF's own tags are EXIF's: the pointer to those about the photograph leads nowhere, or to something else."""
    raw = stored(COLORS, "TIFF", exif=Image.Exif(), tiffinfo={0x112: 6, 0x8769: {0x829A: 1.0}})
    with Image.open(io.BytesIO(raw)) as opened:
        place = opened.tag_v2[0x8769]
    at = raw.index(struct.pack("<HHI", 0x8769, 4, 1)) + 8
    assert struct.unpack("<I", raw[at : at + 4]) == (place,)
    want = np.rot90(np.asarray(COLORS), -1).tolist()
    for pointer in (place, 2**31, 2**32 - 1, 1, 0):
        content = raw[:at] + struct.pack("<I", pointer) + raw[at + 4 :]
        assert seen(content).tolist() == want, pointer


def test_drawn_exif_blocks_leave_an_image_usable():
    """... of 200, in which orientation stands anywhere among drawn entries."""
    draws = np.random.default_rng(0)
    raw = np.asarray(COLORS)
    for _ in range(200):
        entries = [
            (int(draws.integers(0xFFFF)), int(draws.integers(1, 14)), int(draws.integers(4)), draws.bytes(4))
            for _ in range(draws.integers(6))
        ]
        tags = [entry for entry in entries if entry[0] != 0x112]
        tags.insert(int(draws.integers(len(tags) + 1)), TURNED)
        assert seen(with_exif("PNG", exif_block(*tags))).tolist() == np.rot90(raw, -1).tolist()


def test_damaged_exif_says_nothing_of_the_orientation():
    for block in (b"Exif\0\0", b"Exif\0\0no tags at all", exif_block(TURNED)[:20]):
        assert seen(with_exif("PNG", block)).tolist() == np.asarray(COLORS).tolist()


@pytest.mark.parametrize("compressed", [False, True])
def test_a_long_text_is_no_damage(compressed):
    """ComfyUI writes its workflow, and WebUI its prompts, into the PNG."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", json.dumps(list(range(600_000))), zip=compressed)
    text.add_itxt("prompt", "ä" * 2_000_000, zip=compressed)
    assert seen(stored(COLORS, pnginfo=text)).tolist() == np.asarray(COLORS).tolist()


def test_a_text_that_fills_the_memory_is_refused():
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 2**27, zip=True)
    with pytest.raises(UnusableImage, match="too large"):
        seen(stored(COLORS, pnginfo=text))


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def late(*chunks):
    """A PNG with chunks behind its pixels."""
    raw = stored(COLORS)
    return raw[:-12] + b"".join(chunk(*each) for each in chunks) + raw[-12:]


BLOCK = exif_block(TURNED)[6:]
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW_PROFILE = f"\nexif\n{len(BLOCK) + 6:8}\n{(b'Exif' + bytes(2) + BLOCK).hex()}\n".encode()
LATE_TAGS = {
    "eXIf": [(b"eXIf", BLOCK)],
    "behind a text": [(b"tEXt", b"Comment\0x"), (b"eXIf", BLOCK)],
    "before a long text": [(b"eXIf", BLOCK), (b"tEXt", b"Comment\0" + b"x" * 100_000)],
    "XMP": [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)],
    "ImageMagick": [(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE))],
}


@pytest.mark.parametrize("what", LATE_TAGS)
def test_the_bucket_is_that_of_the_upright_image_where_tags_follow_the_pixels(tmp_path, what):
    (tmp_path / "0.png").write_bytes(late(*LATE_TAGS[what]))
    (tmp_path / "0.txt").write_text("x")
    rows = opening.load_dataset(DataOptions(folder=str(tmp_path)))
    assert rows.image(0).size == (48, 64)
    assert checking.image_sizes(rows).tolist() == [[48, 64]]
    assert rows.digest_and_size(0)[1] == (48, 64)
    sizes = buckets.training_sizes(rows, 64, BucketLimits(64, 32, 128, 8))
    assert sizes[0][0] < sizes[0][1]


def test_other_pngs_are_not_decoded_for_their_size(monkeypatch):
    loaded = []
    contents = (stored(COLORS), late((b"tEXt", b"date:create\0today")), stored(COLORS, exif=Image.Exif()))
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: loaded.append(self))
    for content in contents:
        with open_image({"bytes": content}) as opened:
            assert image_ops.upright_size(opened) == (64, 48)
    assert not loaded


def test_a_size_may_be_asked_for_before_the_pixels():
    with open_image({"bytes": late((b"tEXt", b"a\0b"))}) as opened:
        image_ops.upright_size(opened)
        assert np.asarray(image_ops.upright_rgb(opened)).tolist() == np.asarray(COLORS).tolist()


# --- formats ---------------------------------------------------------------------------------------------------------

KINDS = {
    "jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "mpo": "MPO", "apng": "PNG", "jp2": "JPEG2000", "j2k": "JPEG2000",
    "jpx": "JPEG2000", "ppm": "PPM", "pgm": "PPM", "pnm": "PPM", "tga": "TGA", "dib": "DIB", "qoi": "QOI",
    "pcx": "PCX", "dds": "DDS", "sgi": "SGI", "avif": "AVIF", "webp": "WEBP", "gif": "GIF", "tif": "TIFF",
}  # fmt: skip


def test_what_pillow_reads_is_trained(tmp_path):
    for number, (ending, kind) in enumerate(KINDS.items()):
        (tmp_path / f"{number}.{ending}").write_bytes(stored(image(number), kind))
        (tmp_path / f"{number}.txt").write_text("x")
    rows = opening.load_dataset(DataOptions(folder=str(tmp_path)))
    assert checking.check_dataset(rows) == [] and len(rows) == len(KINDS)
    assert all(rows.image(index).size == (20, 16) for index in range(len(rows)))
    assert not rows.findings.left_out


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(100)
JXL = b"\xff\x0a" + bytes(100)


def test_images_of_a_plug_in_that_is_missing_get_the_line_that_installs_it(tmp_path, monkeypatch, capsys):
    """Also where the ending is another one: phones' images are often called .jpg."""
    monkeypatch.setattr(plug_ins, "MISSING", PLUG_INS)
    for content, name in ((HEIC, "pillow-heif"), (JXL, "pillow-jxl-plugin")):
        with pytest.raises(UnusableImage, match=f"pip install {name} to read them"):
            open_image({"bytes": content})
        (tmp_path / "IMG_1.JPG").write_bytes(content)
        (tmp_path / "IMG_1.TXT").write_text("x")
        with pytest.raises(UserError, match=rf"IMG_1.JPG \(.*; pip install {name}"):
            checking.check_dataset(opening.load_dataset(DataOptions(folder=str(tmp_path))))
    with pytest.raises(UnusableImage, match="^.*not an image.*$"):
        open_image({"bytes": b"neither of them"})


PLANTED = """
import sys
from PIL import Image
def register_heif_opener():
    Image.register_extension("PNG", ".heic")
"""
USE = """
from training_utils.cli.options import DataOptions
from training_utils.data import opening, plug_ins
rows = opening.load_dataset(DataOptions(folder="set"))
print(len(rows), rows.image(0).size, len(rows.findings.left_out), [plug.pip for plug in plug_ins.MISSING])
"""


@pytest.mark.parametrize(("planted", "expected"), [(PLANTED, "2 (20, 16) 0"), ("import nothing_like_this", "1 (20")])
def test_a_plug_in_that_is_installed_is_used_and_a_broken_one_is_none(tmp_path, planted, expected):
    (tmp_path / "set").mkdir()
    for number, name in enumerate(("0.png", "1.heic")):
        (tmp_path / "set" / name).write_bytes(stored(image(number)))
        (tmp_path / "set" / f"{number}.txt").write_text("x")
    (tmp_path / "pillow_heif.py").write_text(planted)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]{USE}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout.startswith(expected), ended.stderr
    assert ("pillow-heif" in ended.stdout) == (planted != PLANTED)
