"""SiameseIM: masks, positions, loss and norm against loops and pictures of coordinates; ablations; pictures."""

import math

import pytest
import torch
from torch import nn

import siameseim
import vit
from conftest import close, log, network, step_once, tiny


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 10)])
def test_masks_hide_the_exact_number(blocks, grid):
    n, g = math.prod(grid), torch.Generator().manual_seed(0)
    draws = dict(noise=torch.rand((50, n), generator=g))
    if blocks:
        draws["blocks"] = torch.rand((50, 12, 4), generator=g)
    for ratio in (0.3, 0.6):
        found = siameseim.visible_patches(draws, grid, ratio)
        assert found.shape == (50, n - round(ratio * n)) and all(len(row.unique()) == len(row) for row in found)
    visible = torch.zeros(50, n).scatter(1, found, 1.0).view(-1, *grid)
    neighbours = (visible[:, :, 1:] == visible[:, :, :-1]).float().mean()
    assert neighbours > 0.7 if blocks else 0.45 < neighbours < 0.6


def test_blocks_are_no_smaller_than_asked():
    """Up to rounding: the first round alone hides a rectangle of at least 16/196 of the patches."""
    draws = torch.rand((200, 1, 4), generator=torch.Generator().manual_seed(0))
    first = (siameseim.block_order(draws, (14, 14), 0.6) == 0).view(-1, 14, 14).float()
    rows, columns = first.amax(2).sum(1), first.amax(1).sum(1)
    assert (rows * columns == first.sum((1, 2))).all() and (rows * columns >= 9).all()


def test_positions_agree_with_the_crops():
    """Crops of a picture whose pixels are their own coordinates: patch k of b shows what `places` says of a."""
    g = torch.Generator().manual_seed(0)
    box, flip = vit.sample_boxes((20, 2), 64, (0.3, 1.0), g), torch.rand((20, 2), generator=g) < 0.5
    ramp = (torch.arange(64) + 0.5) / 64
    image = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64)]).expand(20, -1, -1, -1)
    views = vit.crop_resize(image, box, flip, 96).unflatten(0, (2, 20))
    a, b = (v.unflatten(2, (8, 12)).unflatten(4, (12, 8)).mean((3, 5)) for v in views)  # means of 8 x 12 patches
    rows, columns, *_ = siameseim.places(box, flip, (8, 12))
    for coordinate, place in ((0, rows.view(-1, 8, 12)[:, :, 0]), (1, columns.view(-1, 8, 12)[:, 0])):
        line = lambda v, c=coordinate: v[:, c].mean(dim=2 - c)  # along rows, or along columns
        start, step = line(a)[:, 2:3], (line(a)[:, 5:6] - line(a)[:, 2:3]) / 3
        close((start + (place - 2) * step).float()[:, 2:6], line(b)[:, 2:6], rtol=0, atol=4e-3)  # a quarter of a pixel


def test_loss_against_loops():
    y, z = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    tokens = [(y[b, i], z[b, i]) for b in range(3) for i in range(4)]
    c = sum(torch.outer(t, t) for _, t in tokens) / 12
    near = sum((u - t).square().sum() for u, t in tokens) / 12
    spread = sum(u @ c @ u for u, _ in tokens) / 12
    loss, negative = siameseim.siameseim_loss(y, z, siameseim.correlation(z), 0.3)
    close(loss, (near + 0.3 * spread) / 8)
    close(negative, spread / 8)
    pairs = torch.stack([u @ t for u, _ in tokens for _, t in tokens])  # the term is the mean of (y·z')²
    close(negative, pairs.square().mean() / 8)


def test_batch_norm_over_tokens():
    x, ours, theirs = torch.randn(4, 5, 8), siameseim.TokenBatchNorm(8), nn.BatchNorm1d(8)
    nn.init.uniform_(ours.weight), nn.init.uniform_(ours.bias)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))


def test_what_learns_and_what_does_not(npz):
    net, args = network(method="siameseim")
    x, draws = torch.randn(4, 3, 16, 16), siameseim.sample_step(args, 0, 16)
    draws = {k: v[:4] for k, v in draws.items()}
    z = net.targets(x)
    close(z.mean(-1), torch.zeros(4, 16))
    close(z.var(-1, correction=0), torch.ones(4, 16), rtol=0, atol=1e-3)
    visible = siameseim.visible_patches(draws, net.grid, 0.6)
    pred = net(x, visible, draws["box"], draws["flip"])
    assert pred.shape == z.shape and visible.shape == (4, 16 - round(0.6 * 16))
    siameseim.siameseim_loss(pred, z, siameseim.correlation(z))[0].backward()
    assert all(p.grad is None for p in net.target.parameters())
    assert net.online.vit.patch_embed["proj"].weight.grad is None
    learn = [n for n, p in net.named_parameters() if p.requires_grad]
    assert all(dict(net.named_parameters())[n].grad is not None for n in learn)
    assert network("--train-patch-embed", method="siameseim")[0].online.vit.patch_embed["proj"].weight.requires_grad


def test_what_the_first_blocks_hide_is_not_visible(monkeypatch):
    monkeypatch.setattr(siameseim, "block_order", lambda draws, *_: torch.arange(16.0).expand(2, 16))
    draws = dict(blocks=None, noise=torch.zeros(2, 16))
    assert siameseim.visible_patches(draws, (4, 4), 0.6)[0].tolist() == [10, 11, 12, 13, 14, 15]


def test_the_correlation_is_that_of_all_processes(npz, monkeypatch):
    """By what stands for the other processes here: if it gives back 0, the uniformity term of the loss is 0."""
    imgs = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    uniformity = lambda: step_once(*network(method="siameseim"), imgs)[1]
    assert uniformity() > 0.01
    monkeypatch.setattr(siameseim, "mean_over_processes", torch.zeros_like)
    assert uniformity() == 0


@pytest.mark.parametrize("name", siameseim.ABLATIONS)
def test_ablations_change_what_they_say(npz, name, monkeypatch):
    net, args = network("--ablate", name, "--color", 1, method="siameseim")
    vars(args).update(siameseim.ABLATIONS[name])
    draws = siameseim.sample_step(args, 0, 16)
    same = torch.equal(draws["box"][:, 0], draws["box"][:, 1]) and torch.equal(*draws["flip"].unbind(1))
    assert same == (name == "same-view") and not torch.equal(*draws["brightness"].unbind(1)) or name == "no-color"
    assert (draws["sigma"].any() or draws["solarize"].any() or (draws["hue"] != 0).any()) == (name != "no-color")
    assert (net.neg_weight == 0) == (name == "no-uniformity")
    asked, real = [], siameseim.global_loss
    monkeypatch.setattr(siameseim, "global_loss", lambda *a: asked.append(1) or real(*a))
    siameseim.main(tiny("--steps", 2, "--ablate", name, method="siameseim"))
    assert log()[0]["args"]["ablate"] == name and len(asked) == 2 * (name == "global")


def test_the_global_loss_compares_one_vector_per_image():
    y, z = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    means = torch.nn.functional.layer_norm(z.mean(1), (8,))
    expected = siameseim.siameseim_loss(y.mean(1), means, means.T @ means / 3, 0.1)[0]
    close(siameseim.global_loss(y, z, None, 0.1)[0], expected)


def test_a_collapse_is_named(npz, capsys, monkeypatch):
    monkeypatch.setattr(siameseim.SiameseIM, "targets", lambda self, imgs: torch.ones(len(imgs), 16, 16))
    siameseim.main(tiny("--steps", 12, method="siameseim"))
    assert "COLLAPSED" in capsys.readouterr().out
