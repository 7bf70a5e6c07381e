"""Equal to the authors' own code: numbers computed by running it, on networks whose every parameter was perturbed."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

import dino
import mae_pcae
import siameseim
import vit
from conftest import close

GOLDEN = Path(__file__).with_name("golden")


def golden(name):
    """The arrays of a golden file as tensors, and its weights (those under w/) by the authors' names."""
    arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    return arrays, {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}


def load(net, weights):
    """Strictly, but for the mean and std of a data set, which the authors do not keep."""
    net.load_state_dict(weights | {k: v for k, v in net.state_dict().items() if k in ("mean", "std")})


def test_vit():
    z, weights = golden("vit")
    size, patch, dim, depth, heads = z["config"].tolist()
    net = vit.ViT(size, patch, 3, dim, depth, heads).eval()
    net.load_state_dict(weights)  # strict: the authors' names are ours
    with torch.no_grad():
        close(net(z["x"])[:, 0], z["cls"])
        close(net.cls(z["x"]), z["cls"])
        close(torch.stack(net.layers(z["x"])), z["layers"])
        close(net.attention(z["x"]), z["last_attention"])


def test_dino_head():
    z, weights = golden("dino_head")
    weights["prototypes"], weights["weight_g"] = weights.pop("last_layer.weight_v"), weights.pop("last_layer.weight_g")
    head = dino.DINOHead(z["z"].shape[1], 64, hidden=64, bottleneck=32)
    head.load_state_dict(weights)
    close(head(z["z"]), z["logits"])


def test_dino_loss_and_center_over_five_steps():
    z, _ = golden("dino_loss")
    center, views = torch.zeros(z["teacher"].shape[-1]), int(z["n_crops"])
    for i, temp in enumerate(z["teacher_temp"].tolist()):
        student = z["student"][i].clone().requires_grad_()
        teacher = z["teacher"][i].unflatten(0, (2, -1))
        temps = dict(student_temp=float(z["student_temp"]), teacher_temp=temp)
        loss, _, _ = dino.dino_loss(student.unflatten(0, (views, -1)), teacher, center, **temps)
        loss.backward()
        close(loss, z["loss"][i])
        close(student.grad, z["student_grad"][i], rtol=1e-4, atol=1e-6)
        center.lerp_(teacher.mean((0, 1)), 1 - float(z["center_momentum"]))
        close(center, z["center_after"][i, 0])


@pytest.mark.parametrize("name", ["lr", "wd", "momentum"])
def test_schedules(name):
    z, _ = golden("schedules")
    base, final, epochs, per_epoch, warmup = z[f"{name}_args"].tolist()
    total = int(epochs * per_epoch)
    ours = [vit.cosine(i, total, base, final, warmup * per_epoch) for i in range(total)]
    np.testing.assert_allclose(ours, z[name].numpy(), rtol=1e-5, atol=1e-12)


def test_knn():
    z, _ = golden("knn")
    ks = (1, 5, 20, 100)
    ours = vit.knn(z["train"], z["train_labels"], z["test"], z["test_labels"], ks, float(z["temperature"]))
    for k in ks:
        np.testing.assert_allclose(ours[k], z[f"top_k{k}"].numpy(), atol=1e-3)


def mae_options(z, **more):
    size, patch, dim, depth, heads, decoder_dim, decoder_depth, decoder_heads = z["config"].tolist()
    options = dict(patch=patch, decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
    options |= dict(mask_ratio=float(z["mask_ratio"]), norm_pix=True, stages=None, keep=0.5, criterion="unit")
    options |= dict(drop_path=0.0)
    shape = dict(img_size=size, patch=patch, in_chans=3, dim=dim, depth=depth, heads=heads)
    return shape, argparse.Namespace(**options | more), [0.0] * 3, [1.0] * 3


def own_names(weights):
    """The authors' names of MAE's parameters as ours: the encoder's lie under vit."""
    own = ("mask_token", "decoder")
    return {k if k.startswith(own) else f"vit.{k}": v for k, v in weights.items()}


@pytest.mark.parametrize("norm_pix", [0, 1])
def test_mae(norm_pix):
    z, weights = golden("mae")
    net = mae_pcae.MAE(*mae_options(z, norm_pix=bool(norm_pix)))
    load(net, own_names(weights))
    visible, hidden = mae_pcae.random_masking(z["noise"], float(z["mask_ratio"]))
    mask = torch.ones_like(z["mask"]).scatter(1, visible, 0.0)
    assert torch.equal(mask, z["mask"])
    latent = net.vit(z["x"], visible)
    close(latent, z["latent"])
    close(net.decode(latent, visible, hidden), vit.gather_tokens(z["pred"], hidden))
    close(mae_pcae.patchify(z["x"], net.patch), z["patches"], rtol=0, atol=0)
    loss, _, _ = net(z["x"], z["noise"])
    close(loss, z[f"loss_norm{norm_pix}"])
    loss.backward()
    grad = net.vit.patch_embed["proj"].weight.grad
    close(grad, z[f"grad_patch_embed_norm{norm_pix}"], rtol=1e-4, atol=1e-6)


def pcae_net(z, stages=None):
    net = mae_pcae.PCAE(*mae_options(z, stages=stages))
    weights = own_names({k[8:]: v for k, v in z.items() if k.startswith("student/")})
    weights |= {f"teacher.{k[8:]}": v for k, v in z.items() if k.startswith("teacher/")}
    load(net, weights)
    return net


@pytest.mark.parametrize("case,rule", [(0, lambda i: 2 * i), (1, lambda i: 2 * (i + 1) - 1), (3, lambda i: i)])
def test_pcae_keeps_the_same_tokens(case, rule):
    z, _ = golden("pcae")
    net = pcae_net(z, [rule(i) for i in range(3)])
    visible, hidden = mae_pcae.random_masking(z["noise"], float(z["mask_ratio"]))
    assert torch.equal(visible.sort()[0], z["student_kept"].sort()[0])
    _, left = net.compress(z["x"], hidden)
    assert torch.equal(left[-1].sort()[0], z[f"teacher_kept_case{case}"].sort()[0])
    assert [index.shape[1] for index in left] == [24, 12, 6]


def test_pcae():
    z, _ = golden("pcae")
    net = pcae_net(z)
    visible, hidden = mae_pcae.random_masking(z["noise"], float(z["mask_ratio"]))
    latent, left = net.compress(z["x"], hidden)
    order, theirs = left[-1].argsort(dim=1), z["teacher_kept_case0"].argsort(dim=1)
    for ours, name in ((latent, "teacher_latent"), (mae_pcae.standardise(latent), "target")):
        close(vit.gather_tokens(ours, order), vit.gather_tokens(z[name], theirs))
    pred = net.decode(net.vit(z["x"], visible), visible, left[-1])
    close(vit.gather_tokens(pred, order), vit.gather_tokens(z["pred"], theirs))
    loss, _, _ = net(z["x"], z["noise"])
    close(loss, z["loss"])
    loss.backward()
    close(net.vit.patch_embed["proj"].weight.grad, z["grad_patch_embed"], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in net.teacher.parameters())


def siameseim_net(z):
    side, patch, dim, depth, heads, decoder_dim, decoder_heads, projector, predictor = z["config"].tolist()
    args = argparse.Namespace(decoder_dim=decoder_dim, decoder_heads=decoder_heads, projector_depth=projector)
    vars(args).update(decoder_depth=predictor, norm="batch", train_patch_embed=False)
    vars(args).update(drop_path=0.0, mask_ratio=0.6, neg_weight=0.02)
    shape = dict(img_size=side, patch=patch, in_chans=3, dim=dim, depth=depth, heads=heads)
    net, weights = siameseim.SiameseIM(shape, args, [0.0] * 3, [1.0] * 3), {}
    for name, value in z.items():
        if not name.startswith("w/") or name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        tower, name = ("target", name[5:]) if name.startswith("w/mm_") else ("online", name[2:])
        name = name.replace(".bn.", ".")
        ours = {"projector_decoder_blocks": f"{tower}.projector", "predictor_decoder_blocks": "decoder"}
        ours |= {"decoder_embed": f"{tower}.embed", "decoder_pred": "pred", "decoder_pos_mlp": "position"}
        own = {"decoder_pos_embed", "mask_token"}
        first = name.split(".")[0]
        if first in own:
            weights |= {} if tower == "target" else {name: value}
        else:
            weights[name.replace(first, ours.get(first, f"{tower}.vit.{first}"), 1)] = value
    weights["target.vit.pos_embed"] = weights["online.vit.pos_embed"]
    load(net, weights)
    return net


def siameseim_boxes(z):
    """Boxes and flips that have the file's offsets: view a is the unit square at the origin."""
    one, width = torch.ones(4), z["flip_delta_j"] + z["delta_j"]
    x2 = torch.where(z["relative_flip"], width - z["delta_j"] - z["delta_w"], z["delta_j"])
    box = [torch.stack([0 * one, 0 * one, one, one], 1), torch.stack([z["delta_i"], x2, z["delta_h"], z["delta_w"]], 1)]
    return torch.stack(box, dim=1), torch.stack([z["relative_flip"] & False, z["relative_flip"]], dim=1)


def test_siameseim_relative_positions():
    z = golden("siameseim")[0]
    found = siameseim.relative_positions(*siameseim_boxes(z), (4, 4), z["relative_pos_embed"].shape[-1] // 2)
    close(found, z["relative_pos_embed"], atol=2e-5)


def test_siameseim_loss():
    z = golden("siameseim")[0]
    pred = z["loss_pred"].requires_grad_()
    target = torch.nn.functional.layer_norm(z["loss_target"], z["loss_target"].shape[-1:])  # theirs does so in the loss
    loss, _ = siameseim.siameseim_loss(pred, target, siameseim.correlation(target), float(z["neg_weight"]))
    close(loss, z["loss_value"], atol=1e-6)
    loss.backward()
    close(pred.grad, z["loss_pred_grad"], rtol=1e-4, atol=1e-8)


def test_siameseim_step():
    z = golden("siameseim")[0]
    net = siameseim_net(z)
    vit.ema_update(net.target, net.online, float(z["momentum"]), torch.ones(()))
    close(net.target.vit.blocks[0].attn.qkv.weight.data, z["mm_qkv0_after"], atol=1e-6)
    target = net.targets(z["x2"])
    visible = z["mask"].argsort(dim=1, stable=True)[:, : int((z["mask"][0] == 0).sum())]
    pred = net(z["x1"], visible, *siameseim_boxes(z))
    loss, _ = siameseim.siameseim_loss(pred, target, siameseim.correlation(target), float(z["neg_weight"]))
    close(loss, z["loss"])
    loss.backward()
    qkv = net.online.vit.blocks[0].attn.qkv.weight.grad, z["grad_block0_qkv"]
    for ours, theirs in ((net.mask_token.grad, z["grad_mask_token"]), qkv):
        close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
