"""SiameseIM: masks, positions, loss and norm against loops and pictures of coordinates; ablations; pictures."""

import math

import pytest
import torch
from conftest import checkpoint, fails, log, tensors, tiny
from PIL import Image
from torch import nn

import siameseim

close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def net_and_args(*options):
    args = siameseim.get_args(tiny(*options, method="siameseim"))
    args.loss_fn, args.alter = siameseim.ablated(args)
    torch.manual_seed(0)
    net = siameseim.SiameseIM(siameseim.shape_of(args, 3), args)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net, args


@pytest.mark.parametrize("order", [siameseim.block_order, siameseim.random_order])
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 10)])
def test_masks_hide_the_exact_number(order, grid):
    n, g = math.prod(grid), torch.Generator().manual_seed(0)
    for ratio in (0.3, 0.6):
        found = order(50, grid, ratio, g)
        assert torch.equal(found.sort()[0], torch.arange(n).expand(50, n))  # each patch has one place in the order
    hidden = torch.zeros(50, n).scatter(1, found[:, : round(0.6 * n)], 1.0).view(-1, *grid)
    neighbours = (hidden[:, :, 1:] == hidden[:, :, :-1]).float().mean()
    assert neighbours > 0.7 if order is siameseim.block_order else 0.45 < neighbours < 0.6


def test_blocks_are_no_smaller_than_asked():
    """Up to rounding: the first round alone hides a rectangle of at least 16/196 of the patches."""
    order = siameseim.block_order(200, (14, 14), 0.6, torch.Generator().manual_seed(0), rounds=1)
    first = torch.zeros(200, 196).scatter(1, order[:, :9], 1.0).view(-1, 14, 14)
    rows, columns = first.amax(2).sum(1), first.amax(1).sum(1)
    assert (rows * columns >= 9).all()


def test_equal_views_lie_on_each_other():
    box = torch.tensor([[[3, 5, 20, 16]] * 2, [[0, 1, 9, 12]] * 2]).float()
    for flip in ([False, False], [True, True]):
        rows, columns, taller, wider = siameseim.places(box, torch.tensor([flip] * 2), 32, (4, 8))
        close(rows, torch.arange(4).repeat_interleave(8).expand(2, -1).float())
        close(columns, torch.arange(8).repeat(4).expand(2, -1).float())
        assert not taller.any() and not wider.any()
    columns = siameseim.places(box, torch.tensor([[False, True]] * 2), 32, (4, 8))[1]
    close(columns, torch.arange(7, -1, -1).repeat(4).expand(2, -1).float())  # mirrored


def test_the_right_half_of_a_view():
    box = torch.tensor([[[0, 0, 16, 16], [0, 8, 16, 8]]]).float()
    _, columns, taller, wider = siameseim.places(box, torch.tensor([[False, False]]), 32, (4, 4))
    close(columns[0, :4], torch.tensor([1.75, 2.25, 2.75, 3.25]).float())
    close(wider, torch.full((1, 16), 10 * math.log(0.5)))
    assert not taller.any()


def test_positions_agree_with_the_crops():
    """Crops of a picture whose pixels are their own coordinates: patch k of b shows what `places` says of a."""
    g = torch.Generator().manual_seed(0)
    box, flip = siameseim.draw_boxes((20, 2), 64, (0.3, 1.0), 1.0, g), torch.rand((20, 2), generator=g) < 0.5
    ramp = (torch.arange(64) + 0.5) / 64
    image = torch.stack([ramp[:, None].expand(64, 64), ramp.expand(64, 64)]).expand(20, -1, -1, -1)
    views = siameseim.crop_resize(image, box, flip, (64, 64)).unflatten(0, (2, 20))
    a, b = (v.unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean((3, 5)) for v in views)  # means of 8 x 8 patches
    rows, columns, *_ = siameseim.places(box, flip, 64, (8, 8))
    for coordinate, place in ((0, rows.view(-1, 8, 8)[:, :, 0]), (1, columns.view(-1, 8, 8)[:, 0])):
        line = lambda v, c=coordinate: v[:, c].mean(dim=2 - c)  # along rows, or along columns
        start, step = line(a)[:, 2:3], (line(a)[:, 5:6] - line(a)[:, 2:3]) / 3
        torch.testing.assert_close(
            (start + (place - 2) * step).float()[:, 2:6], line(b)[:, 2:6], rtol=0, atol=4e-3
        )  # a quarter of a pixel


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
    net, args = net_and_args()
    x, draws = torch.randn(4, 3, 16, 16), siameseim.draw_pairs(args, 0)
    draws = {k: v[:4] for k, v in draws.items()}
    z = net.targets(x)
    close(z.mean(-1), torch.zeros(4, 16))
    torch.testing.assert_close(z.var(-1, correction=0), torch.ones(4, 16), rtol=0, atol=1e-3)
    pred = net(x, draws["visible"], draws["box"], draws["flip"], 16)
    assert pred.shape == z.shape and draws["visible"].shape == (4, 16 - round(0.6 * 16))
    siameseim.siameseim_loss(pred, z, siameseim.correlation(z))[0].backward()
    assert all(p.grad is None for p in net.target.parameters())
    assert net.online.vit.patch_embed["proj"].weight.grad is None
    learn = [n for n, p in net.named_parameters() if p.requires_grad]
    assert all(dict(net.named_parameters())[n].grad is not None for n in learn)
    assert net_and_args("--train-patch-embed")[0].online.vit.patch_embed["proj"].weight.requires_grad


def test_what_is_hidden_comes_first_in_the_order(npz, monkeypatch):
    args = net_and_args()[1]
    monkeypatch.setattr(siameseim, "block_order", lambda batch, grid, *_: torch.arange(16).expand(batch, 16))
    assert siameseim.draw_pairs(args, 0)["visible"][0].tolist() == [10, 11, 12, 13, 14, 15]


def test_the_correlation_is_that_of_all_processes(npz, monkeypatch):
    """By what stands for the other processes here: if it gives back 0, the second term of the loss is 0."""
    net, args = net_and_args("--precision", "fp32")
    imgs = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    mean, std, cpu = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.3), torch.device("cpu")

    def second_term():
        draws = siameseim.draw_pairs(args, 0)
        return siameseim.train_step(net, siameseim.Update([net], cpu, "fp32"), imgs, draws, args, 0.9, mean, std)[1]

    assert second_term() > 0.01
    monkeypatch.setattr(siameseim, "mean_over_processes", torch.zeros_like)
    assert second_term() == 0


def test_target_follows_the_online_network(npz):
    siameseim.main(tiny("--steps", 3, "--lr", 0.5, "--momentum", 0.5, method="siameseim"))
    net = tensors(checkpoint()["net"])
    pairs = [(net[k], net[k.replace("/online", "/target")]) for k in net if k.startswith("/online")]
    assert any(not torch.equal(a, b) for a, b in pairs) and all(a.shape == b.shape for a, b in pairs)


@pytest.mark.parametrize("name", siameseim.ABLATIONS)
def test_ablations_change_what_they_say(npz, name):
    net, args = net_and_args("--ablate", name, "--color", 1)
    draws = siameseim.draw_pairs(args, 0)
    changed = args.alter(draws)
    same = torch.equal(changed["box"][:, 0], changed["box"][:, 1]) and torch.equal(*changed["flip"].unbind(1))
    assert same == (name == "same-view") and torch.equal(changed["sigma"], draws["sigma"])
    assert (draws["sigma"].any() or draws["solarize"].any() or (draws["hue"] != 0).any()) == (name != "no-color")
    assert (args.neg_weight == 0) == (name == "no-uniformity")
    y, z = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    dense = siameseim.siameseim_loss(y, z, siameseim.correlation(z), args.neg_weight)[0]
    assert torch.equal(args.loss_fn(y, z, siameseim.correlation(z), args.neg_weight)[0], dense) == (name != "global")
    siameseim.main(tiny("--steps", 2, "--ablate", name, method="siameseim"))
    assert log()[0]["args"]["ablate"] == name


def test_the_loss_falls(npz):
    siameseim.main(tiny("--lr", 0.05, "--epochs", 20, "--neg-weight", 0.24, "--log-every", 8, method="siameseim"))
    values = [r["loss"] for r in log() if "loss" in r]
    assert values[-1] < values[0] - 0.1 and math.isfinite(values[-1])


def test_pictures(npz):
    siameseim.main(tiny("--steps", 2, method="siameseim"))
    with Image.open("run/views.png") as img:
        assert img.size == (5 * 98 + 2, 4 * 98 + 2)


def test_a_collapse_is_named(npz, capsys, monkeypatch):
    monkeypatch.setattr(siameseim.SiameseIM, "targets", lambda self, imgs: torch.ones(len(imgs), 16, 16))
    siameseim.main(tiny("--steps", 12, method="siameseim"))
    assert "COLLAPSED" in capsys.readouterr().out


def test_a_step_on_a_gpu_mixes_no_devices(npz):
    """Fake tensors know their device but hold no numbers: no GPU is needed to find one that was left on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, _ = net_and_args()
    mode, params = FakeTensorMode(), {name: p.detach() for name, p in net.named_parameters()}
    params = {name: mode.from_tensor(p) for name, p in params.items()}
    with mode:
        params = {name: p.to("cuda") for name, p in params.items()}
        imgs, flip = torch.zeros(4, 3, 16, 16, device="cuda"), torch.zeros(4, 2, dtype=torch.bool, device="cuda")
        visible, box = torch.zeros(4, 6, dtype=torch.long, device="cuda"), torch.ones(4, 2, 4, device="cuda")
        y = torch.func.functional_call(net, params, (imgs, visible, box, flip, 16))
        assert y.device.type == siameseim.correlation(y).device.type == "cuda"


@pytest.mark.parametrize("ratio,words", [(1, "leaves none of 16 patches"), (-1, "leaves none of 16 patches")])
def test_mask_ratios_out_of_range(npz, capsys, ratio, words):
    assert words in fails(siameseim.main, tiny("--mask-ratio", ratio, method="siameseim"), capsys)
