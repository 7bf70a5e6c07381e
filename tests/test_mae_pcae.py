"""MAE and PCAE: masking, decoding and compression against loops and closed forms; pictures; wrong input."""

import pytest
import torch
import torch.nn.functional as F

import mae_pcae
import vit
from conftest import close, network, tiny


def net(method="mae", size=(16, 8), **options):
    more = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    return network(*more, method=method, size=size)[0].eval()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9])
def test_visible_and_hidden_patches_partition_the_grid(ratio):
    noise = torch.rand(7, 20)
    visible, hidden = mae_pcae.random_masking(noise, ratio)
    assert visible.shape == (7, int(20 * (1 - ratio)))
    both = torch.cat([visible, hidden], dim=1)
    assert torch.equal(both.sort()[0], torch.arange(20).expand(7, 20))
    x = torch.randn(7, 20, 3)
    again = vit.gather_tokens(vit.gather_tokens(x, both), both.argsort(dim=1))  # un-shuffling restores order
    assert torch.equal(again, x)
    if ratio:  # the patches with the least noise stay
        assert (noise.gather(1, visible).amax(1) <= noise.gather(1, hidden).amin(1)).all()


@pytest.mark.parametrize("size,patch,channels", [((16, 16), 4, 3), ((8, 24), 8, 1), ((12, 6), 2, 13)])
def test_patchify_and_back(size, patch, channels):
    x = torch.randn(2, channels, *size)
    patches = mae_pcae.patchify(x, patch)
    assert patches.shape == (2, size[0] * size[1] // patch**2, patch * patch * channels)
    assert torch.equal(mae_pcae.unpatchify(patches, patch, (size[0] // patch, size[1] // patch)), x)
    assert torch.equal(patches[0, 1].view(patch, patch, channels), x[0, :, :patch, patch : 2 * patch].permute(1, 2, 0))


@torch.no_grad()
def test_nothing_masked_is_the_plain_encoder(npz):
    model, x = net(), torch.randn(3, 3, 16, 8)
    visible, hidden = mae_pcae.random_masking(torch.arange(8).expand(3, 8) / 8, 0.0)
    assert hidden.shape == (3, 0)
    close(model.vit(x, visible), model.vit(x))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss_against_a_loop(npz, norm_pix):
    model, x, noise = net(), torch.randn(3, 3, 16, 8), torch.rand(3, 8)
    model.norm_pix = norm_pix
    visible, hidden = mae_pcae.random_masking(noise, 0.75)
    pred = model.decode(model.vit(x, visible), visible, hidden)
    errors = []
    for b in range(3):
        for i, place in enumerate(hidden[b].tolist()):
            r, c = divmod(place, 2)
            p = x[b, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].permute(1, 2, 0).flatten()
            p = (p - p.mean()) / (p.var() + 1e-6).sqrt() if norm_pix else p
            errors += [(pred[b, i, k] - p[k]) ** 2 for k in range(48)]
    close(model(x, noise)[0], torch.stack(errors).mean())


@pytest.mark.parametrize("criterion", ["mean", "unit"])
def test_redundancy_is_the_cosine_to_the_mean(criterion):
    x = torch.randn(2, 5, 8) * torch.rand(2, 5, 1) * 5
    mean = (x if criterion == "mean" else F.normalize(x, dim=-1)).mean(1, keepdim=True)
    close(mae_pcae.CRITERIA[criterion](x), F.cosine_similarity(x, mean, dim=-1))


@torch.no_grad()
def test_pcae_teacher_sees_the_complement_and_keeps_the_least_redundant(npz):
    model, x = net("pcae", size=(16, 16), stages=0), torch.randn(2, 3, 16, 16)
    visible, hidden = mae_pcae.random_masking(torch.rand(2, 16), 0.75)
    tokens = model.teacher.blocks[0](vit.gather_tokens(model.teacher.embed(x)[:, 1:], hidden))
    latent, left = model.compress(x, hidden)
    assert latent.shape == (2, 6, 32) and [i.shape[1] for i in left] == [6]
    for b in range(2):
        score = F.cosine_similarity(tokens[b], tokens[b].mean(0, keepdim=True), dim=-1)
        assert set(left[0][b].tolist()) == {int(hidden[b, i]) for i in score.argsort()[:6]}
        assert not set(left[0][b].tolist()) & set(visible[b].tolist())
    everywhere = network("--stages", method="pcae")[0]
    assert everywhere.stages == [] and everywhere.compress(torch.rand(2, 3, 16, 16), hidden)[0].shape == (2, 12, 32)


def test_pcae_loss_and_gradient_reach_the_student_alone(npz):
    model, x, noise = net("pcae", size=(16, 16)), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    loss, _, _ = model(x, noise)
    visible, hidden = mae_pcae.random_masking(noise, 0.75)
    latent, left = model.compress(x, hidden)
    target = (latent - latent.mean(-1, keepdim=True)) / (latent.var(-1, keepdim=True) + 1e-6).sqrt()
    pred = model.decode(model.vit(x, visible), visible, left[-1])
    cosines = [F.cosine_similarity(pred[b, i], target[b, i], dim=0) for b in range(2) for i in range(pred.shape[1])]
    close(loss, 1 - torch.stack(cosines).mean())
    loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert model.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_pcae_warns_of_a_teacher_that_hardly_moves(npz, capsys):
    mae_pcae.main(tiny("--steps", 1, "--momentum", 0.9999, method="pcae"))
    assert "100% of the initial teacher would be left after 32 steps" in capsys.readouterr().err
    mae_pcae.main(tiny("--steps", 1, "--momentum", 0.5, out="quick", method="pcae"))
    assert "would be left" not in capsys.readouterr().err


@torch.no_grad()
def test_a_picture_of_a_perfect_prediction_is_the_picture(npz, monkeypatch):
    model, x = net(size=(16, 16)), torch.rand(2, 3, 16, 16)
    of = lambda wanted: vit.gather_tokens(mae_pcae.patchify((x - model.mean) / model.std, 4), wanted)
    perfect = lambda self, latent, visible, wanted: mae_pcae.standardise(of(wanted))
    monkeypatch.setattr(mae_pcae.MAE, "decode", perfect)
    seen = []
    monkeypatch.setattr(mae_pcae, "save_grid", lambda columns, file: seen.extend(columns.values()))
    mae_pcae.draw(model, (x - model.mean) / model.std, "x.png")
    visible, painted, original = seen
    close(original, x, rtol=0, atol=1e-5)
    close(painted, x, rtol=0, atol=1e-3)  # the patch's own mean and variance are undone
    shown = (visible - x).abs().amax(1).unflatten(1, (4, 4)).unflatten(3, (4, 4)).amax((2, 4)) < 1e-5
    assert (shown.sum((1, 2)) == 4).all()  # a quarter of the patches
