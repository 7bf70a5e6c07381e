"""Segmentation from attention and by a linear layer: against loops and closed forms, and the script itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import analyze
import dense
import dino
from conftest import encoder, fails, tiny


def test_mean_iou_of_known_masks():
    wanted = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    third = torch.tensor([[0, 0, 1, 1], [2, 0, 1, 1]])
    found = torch.stack([wanted.where(wanted != 255, 0), torch.zeros(2, 4).long(), third])
    c = torch.arange(3).view(1, -1, 1, 1)
    both, either = dense.overlaps(found[:, None] == c, wanted == c, wanted != 255)
    # what is left out counts for nothing; a class that is in neither mask is left out of the mean
    assert dense.mean_iou(both, either).tolist() == pytest.approx([1, (4 / 7 + 0) / 2, (3 / 4 + 1 + 0) / 3])
    sums = both.sum(0), either.sum(0)  # over all images: intersections 4 + 4 + 3 of class 0, unions 4 + 7 + 4, ...
    assert dense.mean_iou(*sums).item() == pytest.approx((11 / 15 + 6 / 9 + 0) / 3)


def test_the_commonest_class_of_a_patch():
    masks = torch.tensor([[[0, 1, 2, 2], [1, 1, 255, 0], [255, 255, 0, 0], [255, 255, 0, 1]]])
    assert dense.patch_labels(masks, (2, 2), 3).tolist() == [[1, 2, 255, 0]]


def test_attention_that_is_the_mask_scores_one():
    class Seer(torch.nn.Module):
        grid = (4, 4)

        def attention(self, x, queries=None):  # head 0 looks at the bright patches, head 1 at the dark ones
            bright = torch.nn.functional.avg_pool2d(x[:, 0], 4).flatten(1) > 0
            maps = torch.stack([bright, ~bright], dim=1).float() + 1e-4
            return torch.nn.functional.pad(maps[:, :, None], (1, 0))

    masks = torch.zeros(4, 16, 16).long()
    masks[1:, 4:12, 8:] = 1  # the first has no foreground and is left out
    imgs = (255 * masks[:, None]).byte().expand(-1, 3, -1, -1)
    config = dict(img_size=[16, 16], mean=[0.5] * 3, std=[0.5] * 3)
    assert dense.from_attention(Seer(), imgs, masks, config, 0.99, torch.device("cpu")).tolist() == [1, 1, 1]


def test_the_demo_masks_are_read_out(tmp_path, capsys):
    """Shapes are yellow on blue: a linear layer on any patch token finds them, up to the size of a patch."""
    dino.main(tiny("--steps", 1, "--img-size", 32, data="demo.npz", batch=64, out="d"))
    capsys.readouterr()
    result = dense.main(["d/last.pt", "--limit", "200", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and result["method"] == "dino"
    result = result["results"]
    assert result["jaccard_images"] == 400 and result["miou"] > 60  # attention of both splits: nothing is trained
    assert len(result["dense_by_block"]) == 2 and result["dense"] > 60 and result["classes"] == 2
    assert 0 < result["jaccard"] < 50


def save(folder, name, **pixels):
    """Arrays as images: folder/<key>/<name>.png."""
    for kind, x in pixels.items():
        file = Path(folder, kind, f"{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(file)


def test_folders_of_pairs(capsys):
    encoder("x.pt")
    rng = np.random.default_rng(0)
    for i in range(12):
        mask = np.zeros((20, 30), dtype=np.uint8)
        mask[5:15, 8:20] = 1 + i % 2
        mask[:2] = 255
        img = (mask[..., None] * 60 + rng.integers(0, 60, (20, 30, 3))).clip(0, 255)
        save("voc", i, images=img.astype(np.uint8), masks=mask)
    Path("voc/images/3.png").write_bytes(b"broken")
    result = dense.main(["x.pt", "--data", "voc", "--device", "cpu"])["results"]
    assert result["classes"] == 3 and result["train"] + result["test"] == 11
    assert "skipped" in capsys.readouterr().err
    official = dense.main(["x.pt", "--train", "voc", "--test", "voc", "--device", "cpu"])["results"]
    assert official["train"] == official["test"] == 11 and official["jaccard_images"] == 11
    mask = dense.read_mask("voc/masks/0.png", 10)
    assert mask.shape == (10, 15) and set(mask.unique().tolist()) == {0, 1, 255}


def test_masks_are_found_by_folder_and_name_and_must_have_the_image_s_shape(capsys):
    """As in DAVIS, where every sequence begins with 00000."""
    flat = lambda value, size=(16, 8): np.full(size, value, dtype=np.uint8)
    for i, sequence in enumerate(("bear", "car", "cat")):
        for frame in range(2):
            mask = flat(i, (8, 16)) if (i, frame) == (2, 1) else flat(i)  # one is turned
            save("davis", f"{sequence}/0000{frame}", images=flat(50 * i), masks=mask)
    images, masks = dense.load_pairs("davis", 8, 100)
    found = {(int(x.max()), int(m.max())) for x, m in zip(images, masks, strict=True)}
    assert found == {(0, 0), (50, 1), (100, 2)} and len(masks) == 5
    assert "turned?" in capsys.readouterr().err
    for i in range(4):  # nothing to train on
        save("empty", i, images=flat(50), masks=flat(255 if i < 3 else 1))
    encoder("x.pt")
    line = fails(dense.main, ["x.pt", "--data", "empty", "--device", "cpu"], capsys)
    assert "patches of the training masks are not 255: too few" in line
    Image.fromarray(np.full((8, 8), -1, dtype=np.int32)).save("below.tif")
    with pytest.raises(dense.InputError, match="values below 0"):
        dense.read_mask("below.tif", 8)


def test_values_of_masks_are_classes_whatever_they_are():
    encoder("x.pt")
    for i in range(8):
        mask = np.zeros((16, 16), dtype=np.uint16)
        mask[4:12, 4:12] = (128, 26000)[i % 2]
        img = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        save("odd", i, images=img, masks=mask)
    assert dense.main(["x.pt", "--data", "odd", "--device", "cpu"])["results"]["classes"] == 3


@pytest.mark.parametrize("main", [dense.main, analyze.main])
def test_several_processes_are_refused(main, capsys, monkeypatch):
    """They would all do the same work and write the same files."""
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    assert "start it without torchrun" in fails(main, ["x.pt"], capsys)
