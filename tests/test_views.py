"""Every augmentation equals torchvision's for one image with the same numbers; the draws have the right ranges."""

import pytest
import torch
import torchvision.transforms.v2.functional as T
from torchvision.transforms import InterpolationMode

import dino
import siameseim
import vit
from conftest import close


def images(n=6, side=24, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [24, 32, 9])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize(size, flip):
    imgs = images()
    box = torch.tensor([[2, 3, 10, 14], [0, 0, 24, 24], [5, 1, 19, 4], [20, 20, 4, 4], [0, 9, 1, 2], [3, 3, 12, 12]])
    ours = vit.crop_resize(imgs, box[:, None].float(), torch.full((6, 1), flip), size)
    for i, (y, x, h, w) in enumerate(box.tolist()):
        theirs = T.resized_crop(imgs[i], y, x, h, w, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(
            0, 1
        )
        close(ours[i], T.horizontal_flip(theirs) if flip else theirs, rtol=0, atol=1e-4)


def test_crop_resize_orders_views_before_images():
    imgs, box = images(2), torch.tensor([[0, 0, 8, 8], [4, 6, 12, 10], [9, 9, 15, 15]]).float()
    ours = vit.crop_resize(imgs, box.expand(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), 8).unflatten(0, (3, 2))
    for v in range(3):
        alone = vit.crop_resize(imgs, box[v].expand(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool), 8)
        close(ours[v], alone, rtol=0, atol=1e-6)


NEUTRAL = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, keep_color=1.0, sigma=0.0, solarize=False)
VALUES = dict(hue=[-0.1, -0.03, 0.0, 0.04, 1 / 3, 0.5], sigma=[0.1, 0.4, 0.9, 1.3, 1.7, 2.0])
VALUES |= dict(keep_color=[0.0, 1.0] * 3, solarize=[True, True, False] * 2)
THEIRS = dict(brightness=T.adjust_brightness, contrast=T.adjust_contrast, saturation=T.adjust_saturation)
THEIRS |= dict(hue=T.adjust_hue, keep_color=lambda img, keep: img if keep else T.rgb_to_grayscale(img, 3))
THEIRS |= dict(sigma=lambda img, s: T.gaussian_blur(img, [7, 7], [s / 2, s / 2]))  # at half of 224 px
THEIRS |= dict(solarize=lambda img, yes: T.solarize(img, 0.5) if yes else img)


@pytest.mark.parametrize("method", [dino, siameseim])
@pytest.mark.parametrize("name", [*THEIRS, "all of them"])
def test_color_operations(method, name):
    names = [name] if name in THEIRS else [*THEIRS]
    values = {k: VALUES.get(k, [0.6, 0.8, 1.0, 1.1, 1.25, 1.4]) for k in names}
    draws = {k: torch.tensor(values.get(k, [v] * 6))[:, None] for k, v in NEUTRAL.items()}
    draws |= dict(box=torch.tensor([0.0, 0, 24, 24]).expand(6, 1, 4), flip=torch.zeros(6, 1, dtype=torch.bool))
    imgs = (images() * 255).byte()
    pure = [[127, 255, 0, 0, 255, 0], [127, 0, 255, 0, 255, 0], [127, 0, 0, 255, 0, 0]]  # grey, red, ..., yellow, black
    imgs[:, :, :2, :6] = torch.tensor(pure)[:, None]
    expected = []
    for i, img in enumerate(imgs / 255):
        for k in names:
            img = THEIRS[k](img, values[k][i])
        expected.append(img)
    close(method.augment(imgs, draws, 24, 0.5, 0.0, 1.0), torch.stack(expected), rtol=0, atol=1e-4)


def test_boxes_follow_random_resized_crop():
    g = torch.Generator().manual_seed(0)
    y, x, h, w = vit.sample_boxes((4000, 2), 32, (0.2, 0.6), g).unbind(-1)
    assert (y >= 0).all() and (x >= 0).all() and (y + h <= 32).all() and (x + w <= 32).all()
    area, ratio = h * w / 32**2, w / h
    assert area.min() > 0.17 and area.max() < 0.65 and abs(area.mean() - 0.4) < 0.01
    assert ratio.min() > 0.68 and ratio.max() < 1.46 and abs(ratio.log().mean()) < 0.01
    assert (y + h == 32).any() and (x == 0).any()  # the borders are reached


def test_box_that_never_fits_is_the_whole_image():
    box = vit.sample_boxes((50, 1), 8, (3.0, 4.0), torch.Generator().manual_seed(0))
    assert (box == torch.tensor([0.0, 0.0, 8.0, 8.0])).all()


def draws(color, n=4000):
    g = torch.Generator().manual_seed(1)
    return dino.sample_views(n, 2, 32, (0.4, 1), [1.0, 0.1], [0.0, 0.2], color, g)


def test_draws_are_the_published_augmentation():
    d = draws(1.0)
    share = lambda t: t.float().mean(0).tolist()
    assert share(d["flip"]) == pytest.approx([0.5, 0.5], abs=0.03)
    assert share(d["keep_color"] == 0) == pytest.approx([0.2, 0.2], abs=0.03)
    assert share(d["sigma"] > 0) == pytest.approx([1.0, 0.1], abs=0.02)
    assert share(d["solarize"]) == pytest.approx([0.0, 0.2], abs=0.02)
    ranges = dict(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1))
    for name, (low, high) in ranges.items():
        t, neutral = d[name], 0.0 if name == "hue" else 1.0
        assert low <= t.min() < low + 0.01 and high - 0.01 < t.max() <= high
        assert share(t == neutral) == pytest.approx([0.2, 0.2], abs=0.03)
        assert (t == neutral).equal(d["brightness"] == 1)  # jitter is all four or none


def test_color_0_leaves_colours_alone():
    d, imgs = draws(0.0, 6), (images(side=32) * 255).byte()
    d["sigma"].zero_()
    plain = vit.crop_resize(imgs.float() / 255, d["box"], d["flip"], 24)
    close(dino.augment(imgs, d, 24, 0.1, 0.0, 1.0), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_other_channel_counts(channels):
    imgs = torch.randint(0, 256, (6, channels, 32, 32)).byte()
    out = dino.augment(imgs, draws(1.0, 6), 16, 0.1, torch.full((channels, 1, 1), 0.5), 0.2)
    assert out.shape == (12, channels, 16, 16) and out.isfinite().all()


def as_rank(monkeypatch, world):
    """Each rank of so many processes in turn, as far as `processes` tells."""
    for rank in range(world):
        monkeypatch.setattr(vit, "processes", lambda rank=rank: (rank, world))
        yield rank


def test_draws_do_not_depend_on_who_asks(monkeypatch):
    g = lambda: vit.seeded(3, 17)
    whole = dino.sample_views(8, 2, 32, (0.4, 1), [1.0, 0.1], [0.0, 0.2], 1.0, g())
    first, second = (vit.shard(whole, "cpu") for _ in as_rank(monkeypatch, 2))
    for k, v in whole.items():
        assert torch.equal(torch.cat([first[k], second[k]]), v)
    batches = [list(vit.batches(20, 8, 0, 5, 3)) for world in (1, 2) for _ in as_rank(monkeypatch, world)]
    assert [a + b for a, b in zip(batches[1], batches[2], strict=True)] == batches[0]
    assert list(vit.batches(20, 8, 0, 5, 3, whole=True)) == batches[0]
    monkeypatch.undo()
    assert list(vit.batches(20, 8, 3, 5, 3)) == batches[0][3:]  # a restart in the middle of an epoch
    assert len({*batches[0][0], *batches[0][1]}) == 16  # an epoch repeats no image
    assert batches[0][2] != batches[0][0]  # the next one has another order
