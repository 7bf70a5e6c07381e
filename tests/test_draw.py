"""draw.py: pictures of a user's own files from any checkpoint, and one line where that cannot be."""

from pathlib import Path

import pytest
import torch
from PIL import Image

import draw
import mae_pcae
import vit
from conftest import MAIN, encoder, tiny


def picture(name="mine.jpg", size=(90, 50)):
    Image.radial_gradient("L").resize(size).save(name)
    return name


PICTURES = dict(dino=["attention"], siameseim=["attention"], mae=["attention", "reconstruction"])
PICTURES |= dict(pcae=["attention", "tokens"], hybrid=["attention", "reconstruction"])
COLUMNS = dict(attention=6, reconstruction=3, tokens=5, views=5)  # two heads: maps, scale, masks; two stages
TRAINING = PICTURES | dict(siameseim=["views"], mae=["reconstruction"], pcae=["tokens"])


@pytest.mark.parametrize("method", PICTURES)
def test_pictures_of_a_run(npz, method):
    """Those of four images that training draws, and those of a user's own file, beside the checkpoint."""
    MAIN[method](tiny("--steps", 1, method=method))
    written = draw.main(["run/last.pt", picture()])
    assert [Path(f).name for f in written] == [f"{kind}-mine.png" for kind in PICTURES[method]]
    for rows, suffix, kinds in ((4, "", TRAINING[method]), (1, "-mine", PICTURES[method])):
        for kind in kinds:
            with Image.open(f"run/{kind}{suffix}.png") as img:
                columns = COLUMNS[kind] - 2 * (kind == "attention" and rows == 4)  # training draws no masks
                assert img.size == (columns * 98 + 2, rows * 98 + 2 + 14)


def test_of_files_with_an_encoder_alone_attention_is_drawn(npz):
    MAIN["mae"](tiny("--steps", 1, method="mae"))
    state = vit.load_checkpoint("run/last.pt")
    torch.save({k: state[k] for k in ("encoder", "config")}, "bare.pt")
    assert [Path(f).name for f in draw.main(["bare.pt", picture(), "--out", "here"])] == ["attention-mine.png"]
    encoder("grey.pt", channels=1)
    assert draw.main(["grey.pt", picture()])
    torch.save(vit.ViT(32, 8, **vit.SIZES["tiny"]).state_dict(), "foreign.pth")
    assert Path(draw.main(["foreign.pth", picture(), "--heads", "4"])[0]).exists()


def test_attention_at_another_size_costs_one_row_of_it(monkeypatch):
    """Tiles are as large as the image; the last block computes the CLS token's attention alone."""
    net, _ = encoder("x.pt")
    rows, weights = [], vit.Attention.weights
    monkeypatch.setattr(vit.Attention, "weights", lambda self, q, k: rows.append(q.shape[2]) or weights(self, q, k))
    with Image.open(draw.main(["x.pt", picture(), "--img-size", "160", "--device", "cpu"])[0]) as img:
        assert img.size == (6 * 162 + 2, 162 + 2 + 14) and rows == [1]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net.attention(x, queries=1), net.attention(x)[:, :, :1])


def test_a_reconstruction_uses_the_options_of_its_run(npz, monkeypatch):
    MAIN["mae"](tiny("--steps", 1, "--no-norm-pix", "--mask-ratio", 0.5, method="mae"))
    seen = []
    monkeypatch.setattr(mae_pcae, "draw", lambda net, *_: seen.append((net.norm_pix, net.mask_ratio)))
    draw.main(["run/last.pt", picture()])
    assert seen == [(False, 0.5)]
