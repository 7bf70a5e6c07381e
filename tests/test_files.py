"""Images and checkpoints: every layout, odd and hostile files, and the authors' formats."""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.torch import load_file, save_file

import convert
import vit
from conftest import ROOT, Mine, close, pictures


def load(data, split="train", side=None, quiet=True, **options):
    """One split of a data set, `side` px."""
    images = vit.open_images(data, **options)[split == "test"]
    return images.at(side or images.side, quiet)


def save(name, img=None, **options):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    img = Image.fromarray(pictures(1, 32)[0][0]) if img is None else img
    img.save(name, **options)
    return name


RED = np.zeros((8, 8, 3), np.uint8) + np.array([200, 20, 40], np.uint8)


def test_the_demo_set_has_even_classes_and_true_masks():
    train, test = vit.open_images()
    for images, n in ((train, 4000), (test, 800)):
        assert images.side == 32 and images.labels.bincount().tolist() == [n // 10] * 10
    assert vit.open_images(label="shapes")[1].labels.bincount().tolist() == [100] * 8
    with np.load(ROOT / "demo.npz") as z:
        masks = np.unpackbits(z["test_masks"], axis=1).reshape(-1, 32, 32).astype(bool)
        warm = z["test_images"][..., 0] > z["test_images"][..., 2]  # shapes are yellow, the rest is blue
    assert (warm == masks).all()


@pytest.mark.slow
def test_demo_is_reproduced():
    """By tools/make_demo.py; up to the rounding of another NumPy's sine, a few pixels by a level of 17."""
    import make_demo

    drawn = make_demo.make()
    with np.load(ROOT / "demo.npz") as z:
        for k in z.files:
            same = z[k] == drawn[k]
            assert same.all() if k.endswith(("labels", "shapes")) else same.mean() > 0.999, k


def test_safetensors_and_the_weights_in_the_repository(tmp_path):
    """weights/*-nano4-*.pt were saved by version 0.1; their features were recorded with it."""
    with np.load(ROOT / "tests/golden/weights.npz") as z:
        x = torch.from_numpy(z["x"])
        for name in ("dino-nano4-cifar10", "mae-nano4-cifar10"):
            net, config = vit.load_encoder(ROOT / f"weights/{name}.pt")
            save_file({k: v.clone() for k, v in net.state_dict().items()}, "x.safetensors")
            net.load_state_dict(load_file("x.safetensors"))
            with torch.no_grad():
                found = net.encode(vit.prepare(x, config), config["feature"])
            np.testing.assert_allclose(found, z[name], rtol=1e-5, atol=1e-5)


GREY = round(0.299 * 200 + 0.587 * 20 + 0.114 * 40)
MODES = {  # the file's name, the colour that it must have
    "RGB": ("x.tif", (200, 20, 40)),
    "CMYK": ("x.tif", (200, 20, 40)),
    "P": ("x.png", (200, 20, 40)),
    "L": ("x.png", (GREY,) * 3),
    "RGBA": ("x.png", (227, 137, 147)),  # half transparent over white
    "LA": ("x.png", (round(GREY * 128 / 255 + 127),) * 3),
    "1": ("x.png", (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_correct_rgb(mode):
    img, (file, expected) = Image.fromarray(RED), MODES[mode]
    if mode in ("RGBA", "LA"):
        img.putalpha(128)
    img = Image.new("1", (8, 8), 1) if mode == "1" else img.quantize(4) if mode == "P" else img.convert(mode)
    x = vit.decode(save(file, img), 8)
    assert x.shape == (3, 8, 8) and x.dtype == torch.uint8
    assert (x.float().mean((1, 2)) - torch.tensor(expected)).abs().max() <= 2


def test_grey_of_16_bits_is_exact_and_monotone():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for file in ("x.png", "x.tif", "x.pgm"):
        x = vit.decode(save(file, Image.fromarray(levels)), 256)[0].flatten().int()
        assert (x.diff() >= 0).all() and torch.equal(x, (torch.arange(65536) / 257).round().int()), file


SIGNED = dict(int16=np.int16, int32=np.int32, float=np.float32)


@pytest.mark.parametrize("kind", SIGNED)
def test_signed_32_bit_and_floating_point_images_are_refused(kind):
    pixels = np.linspace(-300, 300, 64).reshape(8, 8).astype(SIGNED[kind])
    if kind == "float":
        pixels[0, 0] = np.nan
    img = Image.fromarray(pixels.astype(np.int32)) if kind == "int16" else Image.fromarray(pixels)
    save("x.tif", img, **(dict(tiffinfo={339: 2, 258: 16}) if kind == "int16" else {}))
    with pytest.raises(vit.InputError, match="signed, 32-bit or floating-point pixels: convert it to 8 bits"):
        vit.decode("x.tif", 8)


def test_a_transparent_palette():
    img = Image.new("P", (8, 8), 0)
    img.putpalette([10, 20, 30])
    assert (vit.decode(save("x.png", img, transparency=0), 8) == 255).all()


def test_exif_rotation():
    img = Image.fromarray(np.vstack([np.full((8, 8), 255, np.uint8), np.zeros((8, 8), np.uint8)]))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: white is then on the right
    img.convert("RGB").save("x.jpg", exif=exif, quality=95)
    x = vit.decode("x.jpg", 8).float()
    assert x.shape == (3, 8, 16) and x[..., 10:].mean() > 240 and x[..., :6].mean() < 15
    data = bytearray(Path("x.jpg").read_bytes())
    at = data.index(b"Exif") + 14  # the number of entries in the directory
    data[at : at + 12] = b"\xff" * 12
    Path("broken.jpg").write_bytes(data)
    assert vit.decode("broken.jpg", 8).shape == (3, 16, 8)  # unturned, but not lost


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 2), (640, 480), (9000, 2)])
def test_odd_sizes(size):
    x = vit.decode(save("x.png", Image.new("RGB", size, (9, 99, 199))), 16)
    assert min(x.shape[1:]) == 16 and max(x.shape[1:]) <= 65
    assert vit.square(x).shape == (3, 16, 16)
    assert (x[:, 0, 0].float() - torch.tensor([9.0, 99, 199])).abs().max() <= 1


def test_squares_are_cut_from_the_middle():
    x = torch.arange(10).expand(3, 4, 10)
    assert vit.square(x)[0, 0, 0] == 3 and vit.square(x.transpose(1, 2)).shape == (3, 4, 4)


def test_animation_and_wrong_suffix_are_read_and_other_files_left_alone():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    save("b.bmp")
    os.rename("b.bmp", "b.jpg")
    Path("notes.txt").write_text("not an image")
    Path(".hidden.png").write_bytes(b"")
    images = load(".", side=8)
    assert len(images) == 2 and images[0][:, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "bomb", "header"])
def test_broken_images_are_skipped_counted_and_named(kind, capsys):
    for i in range(9):
        save(f"{i}.png")
    good = Path("0.png").read_bytes()
    bad = dict(truncated=good[:400], empty=b"", text=b"hello", header=good[:20])
    if kind == "bomb":
        Image.new("1", (30000, 20000)).save("bad.png")
    else:
        Path("bad.png").write_bytes(bad[kind])
    assert len(load(".", side=8, quiet=False)) == 9
    assert "skipped 1 unreadable images of 10: bad.png" in capsys.readouterr().err.replace("./", "")


def test_rows_are_those_of_the_files_that_were_read(monkeypatch):
    """With a broken file in the middle: left out and named in memory, an error where features are streamed."""
    for i, name in enumerate("abcd"):
        save(f"d/{name}/0.png", Image.new("RGB", (8, 8), (60 * i, 0, 0)))
    Path("d/b/0.png").write_bytes(b"broken")
    whole = vit.Images(vit.list_images("d"), [0, 1, 2, 3], side=8)
    config = dict(img_size=[8, 8], mean=[0.0] * 3, std=[1.0] * 3)
    encode, device = lambda x: x[:, 0].mean((1, 2))[:, None], torch.device("cpu")
    red = lambda images, workers: vit.features(encode, images, config, device, workers=workers)
    images = whole.at(8, quiet=True)
    assert (red(images, 0)[:, 0] * 255 / 60).round().tolist() == images.labels.tolist() == [0, 2, 3]
    assert images.files == ["d/a/0.png", "d/c/0.png", "d/d/0.png"] == images.subset(9).files
    monkeypatch.setattr(vit, "IN_MEMORY", 0)
    streamed = whole.at(8)
    for workers in (0, 1):
        with pytest.raises(vit.InputError, match="d/b/0.png is not a readable image"):
            red(streamed, workers)
    streamed.replace = True  # as in training, where labels play no part
    for workers in (0, 1):
        heard = pytest.warns(UserWarning, match="takes the place of an unreadable one: .*b/0.png")
        with heard if workers == 0 else warnings.catch_warnings(action="ignore"):  # a process warns on its own
            (batch,) = vit.stream(streamed, vit.in_order(streamed, 4), workers=workers)
        assert (batch[:, 0, 0, 0] // 60).tolist() == [0, 2, 2, 3] and streamed.labels.tolist() == [0, 1, 2, 3]


def test_sets_of_a_user_s_own_are_read_one_by_one(monkeypatch):
    images = vit.Images(Mine(12), range(12), side=10)
    assert images[3].shape == (3, 10, 10) and images.at(10).items.shape == (12, 3, 10, 10)
    assert images.subset(3)[2][0, 0, 0] == 11 and images.files is None
    monkeypatch.setattr(vit, "IN_MEMORY", 0)
    (batch,) = vit.stream(images.at(10), vit.in_order(images, 12), workers=2)  # by processes, as files are
    assert batch[:, 0, 0, 0].tolist() == list(range(12))


ITEMS = dict(floats=torch.rand(3, 8, 8), int64=torch.zeros(3, 8, 8).long(), last=torch.zeros(8, 8, 3).byte())
ITEMS |= dict(numpy=np.zeros((3, 8, 8), np.uint8), pil=Image.new("RGB", (8, 8)), pair=(torch.zeros(3, 8, 8).byte(), 1))
ITEMS |= dict(mask=torch.zeros(3, 8, 8).bool(), flat=torch.zeros(8, 8).byte())


@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_another_kind_are_named(kind):
    with pytest.raises(vit.InputError, match=r"images must be files or uint8 tensors \(C, h, w\), not \w+"):
        vit.Images([ITEMS[kind]] * 3)


LABELS = dict(
    floats=[0.0, 1, 2, 3], unknown=[0, 1, -1, 2], hot=np.eye(4, dtype=int), length=[0, 1, 2], flags=[True] * 4
)
LABELS |= dict(several=np.zeros((4, 14), int), scalar=3, names=[["a", "b"]] * 4)


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_another_kind_are_refused_with_what_was_found(kind):
    np.savez("x.npz", images=pictures(4)[0], labels=np.array(LABELS[kind]))
    found = np.array(LABELS[kind])
    with pytest.raises(vit.InputError, match=r"x.npz, labels: labels must be \(4,\), whole numbers from 0") as e:
        load("x.npz")
    assert f"{found.dtype} {found.shape}" in str(e.value)


def test_labels_are_lists_or_arrays_of_numbers_or_names():
    x, y = pictures(20)
    for labels in (y, y.astype(np.uint8), y[:, None], y.tolist()):
        assert vit.Images(torch.from_numpy(x).permute(0, 3, 1, 2), labels).labels.tolist() == y.tolist()
    with pytest.raises(vit.InputError, match="a data set: labels must be .*whole numbers from 0, not <U1"):
        vit.Images(torch.from_numpy(x).permute(0, 3, 1, 2), ["a", "b"] * 10)  # two sets might number names differently


def test_nothing_readable():
    Path("bad.png").write_bytes(b"x")
    with pytest.raises(vit.InputError, match=r"none of the 1 images can be read: .*bad.png"):
        vit.Images(["bad.png"], side=8).at(8)
    with pytest.raises(vit.InputError, match="none of the first 1 images"):
        load(".")


def folders(*names, n=3):
    for name in names:
        for i in range(n):
            save(f"{name}/{i}.png")


def test_layouts(capsys):
    folders(
        *(f"one/{split}/{name}" for split in ("train", "val") for name in ("cat", "dög")), "three/train", "three/val"
    )
    folders("two/cat/a", "two/cat/b", "two/dög")
    images = load("one", "test", 8)
    assert len(images) == 6 and images.classes == ["cat", "dög"] and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    train, test = vit.open_images("two")
    assert (len(train), len(test)) == (7, 2) and train.classes == ["cat", "dög"] and test.labels.tolist() == [0, 1]
    assert capsys.readouterr().err == ""
    train, test = vit.open_images("three")
    assert train.labels is None and len(train) == 3 and test is None
    with pytest.raises(vit.InputError, match="no images in"):
        os.makedirs("four/train/empty")
        load("four", "train", 8)


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "valid", "validation"])
def test_names_of_splits(train, test):
    folders(*(f"d/{split}/{c}" for split in (train, test) for c in "abc"))
    assert [len(images) for images in vit.open_images("d")] == [9, 9]


def test_what_is_left_out_is_counted_and_named(capsys):
    folders("d/train/a", "d/train/b", "d/val/a", "d/val/b", "d/extra/a", "d/test")  # test/ is flat, as of a contest
    save("d/train/preview.png"), save("d/val/preview.png")
    train, test = vit.open_images("d")
    err = capsys.readouterr().err
    assert len(train) == len(test) == 6 and test.files[0].startswith("d/val/a")
    assert "left out 1 images beside the class folders of d/train: preview.png" in err and "of d/val: preview" in err
    assert re.search(r"not used, besides d/(train|val), d/(train|val): d/extra, d/test", err)
    folders("alone/train/a", "alone/train/b", "alone/dev/a", "alone/dev/b")
    assert [len(images) for images in vit.open_images("alone")] == [4, 2]
    assert "not used, besides alone/train: alone/dev" in capsys.readouterr().err


def test_masks_and_images_are_refused_and_a_link_to_the_folder_itself_counts_once():
    folders("pairs/images", "pairs/masks")
    with pytest.raises(vit.InputError, match="holds images/ and masks/, which dense.py takes"):
        load("pairs")
    folders("d/a", "d/b")
    os.symlink(".", "d/self")
    assert sorted(f for images in vit.open_images("d") for f in images.files) == vit.list_images("d")
    assert len(vit.list_images("d")) == 6


def test_a_tenth_of_each_class_is_held_out_and_nothing_that_is_searched_among():
    labels = torch.arange(10).repeat(30)  # every tenth in order would be one class
    train, test = vit.hold_out(labels)
    assert labels[test].bincount().tolist() == [3] * 10 and sorted([*train, *test]) == list(range(300))
    assert torch.equal(test, vit.hold_out(labels)[1])
    few = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    assert few[vit.hold_out(few)[1]].tolist() == [0, 1]  # a class of one image only trains


def test_without_two_classes_or_a_test_image_there_is_nothing_to_test():
    x, y = pictures(4)
    np.savez("one.npz", train_images=x, train_labels=y * 0, test_images=x, test_labels=y * 0)
    np.savez("single.npz", images=x, labels=np.arange(4))
    np.savez("unknown.npz", train_images=x, train_labels=y, test_images=x)
    folders("album/2024")
    for data in ("one.npz", "single.npz", "album"):
        assert vit.open_images(data)[1] is None
    assert [len(images) for images in vit.open_images("unknown.npz")] == [3, 1]
    assert vit.open_images("one.npz", whole=True)[1].labels.tolist() == [0] * 4  # a classifier can be applied to it


def test_classes_missing_in_one_split_are_numbered_alike():
    x, _ = pictures(4)
    np.savez("x.npz", train_images=x, train_labels=[0, 1, 2, 3], test_images=x, test_labels=[0, 2, 3, 9])
    train, test = vit.open_images("x.npz")
    assert train.labels.tolist() == [0, 1, 2, 3] and test.labels.tolist() == [0, 2, 3, 4]
    assert train.classes == test.classes == ["0", "1", "2", "3", "9"]


def test_links_that_lead_back_and_folders_that_cannot_be_read():
    save("a/x.png")
    os.symlink("..", "a/loop")
    os.makedirs("a/closed")
    os.chmod("a/closed", 0)
    save("a/.ipynb_checkpoints/x.png")
    assert len(vit.list_images("a")) == 1
    os.chmod("a/closed", 0o700)


def test_npz_kinds():
    x, y = pictures(20)
    np.savez("medmnist.npz", train_images=x, train_labels=y[:, None], val_images=x[:4], val_labels=y[:4, None])
    np.savez("grey.npz", images=x[..., 0], labels=np.array(["b", "a"] * 10))
    np.savez("gaps.npz", train_images=x, train_labels=y * 50 + 7, test_images=x[:3], test_labels=y[:3] * 50 + 7)
    assert len(load("medmnist.npz", "test")) == 4  # val stands in for test
    grey = load("grey.npz")
    assert grey.channels == 3 and len(grey) == 18 and grey.classes == ["a", "b"]
    assert len(load("grey.npz", "test")) == 2
    assert load("gaps.npz").labels.tolist() == y.tolist()
    assert load("medmnist.npz", side=8).items.shape == (20, 3, 8, 8)


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
def test_channels_first_is_told_so(channels):
    np.savez("x.npz", images=np.zeros((40, channels, 64, 64), np.uint8))
    with pytest.raises(vit.InputError, match=r"has channels first, .*: give \(N, H, W, C\)"):
        load("x.npz")
    np.savez("x.npz", images=np.zeros((40, 64, 64, channels), np.uint8))
    assert load("x.npz").channels == channels


PIXELS = pictures(4)[0]
WRONG = dict(labels=dict(labels=np.arange(4)), empty=dict(images=PIXELS[:0]), floats=dict(images=PIXELS / 255))
WRONG |= dict(one=dict(images=PIXELS[0]))
WRONG |= dict(objects=dict(images=np.array([print, PIXELS], dtype=object)))


@pytest.mark.parametrize("kind", [*WRONG, "text", "zip"])
def test_npz_that_is_wrong(kind):
    if kind == "text":
        Path("x.npz").write_text("hello")
    elif kind == "zip":
        with zipfile.ZipFile("x.npz", "w") as z:
            z.writestr("images.npy", b"not an array")
    else:
        np.savez("x.npz", **WRONG[kind])
    with pytest.raises(vit.InputError, match="x.npz"):
        load("x.npz")


def test_stats_are_the_channels_mean_and_deviation(npz):
    images = load(npz)
    x = images.items.double() / 255
    mean, std = images.stats()
    np.testing.assert_allclose(mean, x.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(std, x.std((0, 2, 3)), rtol=1e-4)


def test_prepare_at_the_native_size_is_normalisation_and_above_64_px_a_crop_of_7_8():
    x = torch.randint(0, 256, (2, 3, 16, 16)).byte()
    config = lambda *size: dict(img_size=list(size), mean=[0.5] * 3, std=[0.25] * 3)
    torch.testing.assert_close(vit.prepare(x, config(16, 16)), (x / 255 - 0.5) / 0.25)
    ramp = torch.arange(256).byte().expand(1, 3, 256, 256)
    out = (vit.prepare(ramp, config(224, 224))[0, 0, 0] * 0.25 + 0.5) * 255
    close(out, torch.arange(16, 240).float(), rtol=0, atol=1e-3)
    assert vit.prepare(x, config(32, 16)).shape == (2, 3, 32, 16)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return vit.ViT(32, 8, dim=192, depth=2, heads=3)


PREFIX = dict(ddp="module.", compiled="_orig_mod.", dino="module.backbone.", nested="module._orig_mod.encoder.")


def wrapped(how):
    weights = {PREFIX.get(how, "") + k: v for k, v in small().state_dict().items()}
    if how == "dino":
        weights["module.head.mlp.0.weight"] = torch.zeros(2)
        return {"student": {}, "teacher": weights, "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3}
    if how == "mae":
        return {"model": weights | {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(2)}}
    if how == "siameseim":
        return {"model": {k: v for k, v in weights.items() if not k.startswith("norm.")}}
    return weights


@pytest.mark.parametrize("how", ["timm", "ddp", "compiled", "nested", "dino", "mae", "siameseim"])
def test_encoders_of_all_kinds_are_read(how, capsys):
    torch.save(wrapped(how), "x.pth")
    net, config = convert.read_encoder("x.pth")
    err = capsys.readouterr().err
    total = len(net.state_dict())
    with pytest.raises(vit.InputError, match="no checkpoint of ours: python tools/convert.py x.pth makes one"):
        vit.load_encoder("x.pth")
    ours = vit.load_encoder(convert.main(["x.pth"]))
    assert ours[1] == config and torch.equal(ours[0].cls_token, net.cls_token)
    assert f"all {total} tensors of the ViT found" in err and config["heads"] == 3 and config["patch"] == 8
    assert ("not used: head.mlp.0.weight" in err) == (how == "dino") and "3 attention heads assumed" in err
    assert config["feature"] == ("mean" if how == "siameseim" else "cls")  # as its authors evaluate
    x, expected = torch.randn(2, 3, 32, 32), small().eval()
    if how == "siameseim":
        expected.norm = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected(x))


def test_a_foreign_vit_h_has_sixteen_heads():
    shape = vit.SIZES["huge"] | dict(depth=1)
    torch.save(vit.ViT(28, 14, **shape).state_dict(), "h.pth")
    assert convert.read_encoder("h.pth")[1]["heads"] == shape["heads"] == 16
    assert convert.read_encoder("h.pth", heads=8)[1]["heads"] == 8  # MoCo v3's ViT-S has 12, not 6: nothing in it tells
    config = dict(small().config, mean=[0.5] * 3, std=[0.2] * 3, feature="cls")
    torch.save(dict(encoder=small().state_dict(), config=config), "ours.pt")
    assert convert.read_encoder("ours.pt", heads=8)[1]["heads"] == 3  # ours do tell
    with pytest.raises(vit.InputError, match="a width of 1280 cannot be divided among 7 attention heads"):
        convert.read_encoder("h.pth", heads=7)


OTHERS = ("blocks.0.ls1.gamma", "blocks.0.gamma_1", "fc_norm.weight", "reg_token", "register_tokens", "norm_pre.weight")
OTHERS += ("rel_pos_bias.relative_position_bias_table", "blocks.0.attn.relative_position_bias_table", "dist_token")


@pytest.mark.parametrize("extra", OTHERS)
def test_a_network_that_would_be_computed_wrongly_is_refused(extra):
    torch.save(small().state_dict() | {extra: torch.ones(192)}, "x.pth")
    with pytest.raises(vit.InputError, match=f"1 tensors are of a network that is not this ViT: .*{extra}"):
        convert.read_encoder("x.pth")


def test_a_missing_tensor_is_refused():
    weights = small().state_dict()
    del weights["blocks.1.mlp.fc1.weight"]
    weights["norm.bias"] = torch.zeros(7)
    torch.save(weights, "x.pth")
    with pytest.raises(vit.InputError, match="2 tensors are missing or of another shape: .*fc1"):
        convert.read_encoder("x.pth")
    torch.save({"head.weight": torch.zeros(3)}, "y.pth")
    with pytest.raises(vit.InputError, match="holds no ViT"):
        convert.read_encoder("y.pth")


def test_of_pcae_s_files_the_model_is_taken_and_of_dino_s_the_teacher():
    model, teacher = small().state_dict(), {k: v + 1 for k, v in small().state_dict().items()}
    torch.save(dict(model=model, teacher=teacher), "pcae.pth")
    torch.save(dict(student=model, teacher=teacher), "dino.pth")
    torch.save({f"{k}.{n}": v for k, d in (("teacher", teacher), ("vit", model)) for n, v in d.items()}, "both.pth")
    with pytest.raises(vit.InputError, match="both.pth holds several networks whose names differ by a prefix"):
        convert.read_encoder("both.pth")
    for file, expected in (("pcae.pth", model), ("dino.pth", teacher)):
        assert torch.equal(convert.read_encoder(file)[0].cls_token, expected["cls_token"])


@pytest.mark.parametrize("key", ["net", "model_ema", "model_state_dict", "model"])
def test_weights_beside_numbers_arrays_and_paths(key):
    beside = dict(
        best=np.float64(71.2), count=np.int32(3), history=np.arange(3.0), where=argparse.Namespace(out=Path("x"))
    )
    torch.save({key: small().state_dict(), "epoch": 1, **beside}, "x.pth")
    assert torch.equal(convert.read_encoder("x.pth")[0].cls_token, small().cls_token)


def test_a_checkpoint_without_a_vit_says_what_it_holds():
    torch.save(dict(my_weights=dict(small().state_dict()), epoch=3), "x.pth")
    with pytest.raises(vit.InputError, match="its keys: my_weights, epoch.*Save its weights alone, torch.save"):
        convert.read_encoder("x.pth")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch pwned",)


FEW_BYTES = [b"", b"(", b"\x80", b"PK", b"PK\x03\x04", b"\x80\x02}q\x00."]


@pytest.mark.parametrize("content", ["torch", pickle.dumps({"encoder": Bomb()}), *FEW_BYTES])
def test_a_checkpoint_never_runs_code_and_may_be_a_few_bytes(content):
    if content == "torch":
        torch.save({"encoder": Bomb()}, "x.pt")
    else:
        Path("x.pt").write_bytes(content)
    with pytest.raises(vit.InputError, match="x.pt is not a readable checkpoint"):
        convert.read_encoder("x.pt")
    assert not Path("pwned").exists()


# Fuzzing: whatever bytes are given, the loaders either work or say what is wrong --------------------------------------

once = dict(deadline=None, phases=[Phase.explicit, Phase.generate])  # no shrinking: it takes minutes
fuzz = settings(max_examples=int(os.environ.get("FUZZ", 60)), suppress_health_check=list(HealthCheck), **once)


def seeds():
    save("seed.png", Image.fromarray(RED))
    save("seed.jpg", Image.fromarray(RED))
    np.savez("seed.npz", images=pictures(3)[0])
    np.savez_compressed("packed.npz", images=pictures(3)[0])
    torch.save(small().state_dict(), "seed.pt")
    return [Path(f).read_bytes() for f in ("seed.png", "seed.jpg", "seed.npz", "packed.npz", "seed.pt")]


@fuzz
@given(
    kind=st.integers(0, 4),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),  # half of them whole
)
def test_damaged_bytes(kind, edits, cut):
    seed = bytearray(seeds()[kind])
    for at, value in edits:
        seed[int(at * (len(seed) - 1))] = value
    data = bytes(seed[: max(1, int(cut * len(seed)))])
    os.makedirs("f", exist_ok=True)
    file = Path("f", ("x.png", "x.jpg", "x.npz", "x.npz", "x.pt")[kind])
    file.write_bytes(data)
    try:
        if kind < 2:
            vit.decode(str(file), 8)
        elif kind < 4:
            load(str(file))
        else:
            convert.read_encoder(str(file))
    except vit.InputError:
        pass
    finally:
        file.unlink()


SPLITS = ("", "train_", "test_", "val_")
arrays = hnp.arrays(
    dtype=st.sampled_from(["uint8", "uint8", "uint8", "int64", "float32", "bool", "complex64", "U3", "M8[s]"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)


@fuzz
@given(found=st.dictionaries(st.sampled_from([f"{s}{k}" for s in SPLITS for k in ("images", "labels")]), arrays))
def test_odd_arrays(found):
    """A .npz of any arrays under the names that count: pictures that can be used, or an InputError."""
    np.savez("odd.npz", **found)
    for split, side in (("train", None), ("test", 8)):
        try:
            images = load("odd.npz", split, side)
        except vit.InputError:
            continue
        assert images[0].shape == (images.channels, images.side, images.side)
        assert images.labels is None or images.labels.shape == (len(images),)


tensors = st.builds(
    lambda dtype, shape: torch.zeros(shape, dtype=dtype),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.complex64, torch.bfloat16]),
    st.lists(st.integers(0, 5), max_size=5),
)
odd = st.one_of(st.integers(-2, 40), st.floats(), st.text(max_size=3), st.none(), st.lists(st.integers(-1, 9)), tensors)


@fuzz
@given(
    config=st.dictionaries(st.sampled_from([*small().config, "norm"]), odd),
    changes=st.dictionaries(st.sampled_from(sorted(small().state_dict())), odd, max_size=3),
    removed=st.lists(st.sampled_from(sorted(small().state_dict())), max_size=3),
    wrapped=st.booleans(),
)
def test_odd_checkpoints(config, changes, removed, wrapped):
    """A checkpoint with any values in place of its own: an encoder that can be used, or an InputError."""
    net = small()
    weights = {k: v for k, v in (net.state_dict() | changes).items() if k not in removed}
    torch.save(dict(encoder=weights, config=net.config | config) if wrapped else weights, "odd.pt")
    try:
        found, config = convert.read_encoder("odd.pt")
    except vit.InputError:
        return
    assert found(torch.zeros(1, config["in_chans"], *config["img_size"])).shape[-1] == config["dim"]


@pytest.mark.slow
@pytest.mark.parametrize("mae", [False, True])
@pytest.mark.parametrize("kind", ["state dict", "saved"])
def test_networks_of_hugging_face_give_equal_tokens(mae, kind, tmp_path):
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
    shape |= dict(image_size=32, patch_size=8, layer_norm_eps=1e-6)
    decoder = dict(decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, mask_ratio=0.0)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**shape, **decoder)) if mae else ViTModel(ViTConfig(**shape))
    for p in theirs.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x, file = torch.randn(2, 3, 32, 32), tmp_path / "model.safetensors"
    if kind == "saved":
        theirs.save_pretrained(tmp_path)
    else:
        file = tmp_path / "pytorch_model.bin"
        torch.save(theirs.state_dict(), file)
    ours, config = convert.read_encoder(file, heads=4)
    in_order = dict(noise=torch.arange(16.0).repeat(2, 1)) if mae else {}
    with torch.no_grad():
        close((theirs.vit if mae else theirs).eval()(x, **in_order).last_hidden_state, ours(x))
    assert config["depth"] == 3 and config["norm"]
