"""The network: equal to timm's both ways, any size, and its pieces agree with the whole."""

import functools
import math

import onnxruntime
import pytest
import timm
import torch

import vit
from conftest import close


def net(**options):
    torch.manual_seed(0)
    model = vit.ViT(**dict(img_size=32, patch=8, **vit.SIZES["test"]) | options).eval()
    for p in model.parameters():  # away from zero biases and unit gains
        p.data += 0.05 * torch.randn_like(p)
    return model.requires_grad_(False)


def test_same_as_timm_both_ways():
    ours, make = net(), functools.partial(timm.models.VisionTransformer, 32, 8, embed_dim=32, depth=2, num_heads=2)
    theirs = make(num_classes=0).eval()
    theirs.norm.eps = 1e-6
    x = torch.randn(3, 3, 32, 32)
    theirs.load_state_dict(ours.state_dict())  # strict
    close(ours(x), theirs.forward_features(x))
    ours.load_state_dict(make(num_classes=0).state_dict())


@pytest.mark.parametrize("size,patch,chans", [((32, 16), 8, 3), (28, 4, 1), ((8, 40), 8, 13)])
def test_any_shape(size, patch, chans):
    model = net(img_size=size, patch=patch, in_chans=chans)
    h, w = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, chans, h, w)
    assert model(x).shape == (2, 1 + h * w // patch**2, 32)
    assert model(x[..., :patch, :patch]).shape == (2, 2, 32)  # positions are interpolated


@pytest.mark.parametrize("side", range(8, 225, 8))
def test_every_multiple_of_the_patch_and_no_other_size(side):
    assert net()(torch.randn(1, 3, side, 2 * side)).shape == (1, 1 + 2 * (side // 8) ** 2, 32)
    with pytest.raises(vit.InputError, match="not a multiple of the patch size, 8") as error:
        net()(torch.randn(1, 3, side + 1, side))
    assert isinstance(error.value, ValueError)  # as those who call it from their own code expect


def test_positions_at_the_native_size_are_the_parameters_and_elsewhere_bicubic():
    model = net()
    assert model.positions((4, 4)) is model.pos_embed
    pos = model.pos_embed[0, 1:].T.reshape(1, 32, 4, 4)
    expected = torch.nn.functional.interpolate(pos, size=(3, 7), mode="bicubic").flatten(2).transpose(1, 2)
    close(model.positions((3, 7))[:, 1:], expected)


def test_sincos_against_a_table():
    x, y = 3, 5
    expected = [f(p * 10000 ** (-2 * i / 4)) for p in (x, y) for f in (math.sin, math.cos) for i in range(2)]
    close(vit.sincos(torch.tensor([y]), torch.tensor([x]), 8)[0], torch.tensor(expected))
    model = net(pos="sincos")
    assert not model.pos_embed.requires_grad


def test_embed_keeps_the_chosen_patches_with_their_positions():
    model, x = net(), torch.randn(3, 3, 32, 32)
    visible = torch.stack([torch.randperm(16)[:5] for _ in range(3)])
    expected = torch.stack([t[k] for t, k in zip(model.embed(x)[:, 1:], visible, strict=True)])
    close(model.embed(x, visible)[:, 1:], expected)
    conv = model.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # a linear layer on patches is the convolution
    close(model.embed(x)[:, 1:], conv + model.pos_embed[:, 1:])


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_gives_the_same_output_as_the_fused_kernel(layer):
    model, x = net(), torch.randn(3, 3, 32, 16)
    maps = model.attention(x, layer)
    close(maps.sum(-1), torch.ones(3, 2, 9))
    tokens = model.embed(x)
    for block in model.blocks[:layer]:
        tokens = block(tokens)
    block = model.blocks[layer]
    inner = block.norm1(tokens)
    out = (maps @ block.attn.split(inner)[2]).transpose(1, 2).flatten(2)
    close(block.attn.proj(out), block.attn(inner))


def test_bf16_attention_on_a_cpu_agrees_with_the_fused_one():
    model, x = net().bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    q, k, v = model.blocks[0].attn.split(model.embed(x))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    fused = model.blocks[0].attn.proj(fused.transpose(1, 2).flatten(2))
    close(model.blocks[0].attn(model.embed(x)), fused, rtol=0.03, atol=0.03)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    y = vit.drop_path(torch.ones(20000, 1, 1), 0.25)
    assert vit.drop_path(torch.ones(2, 1, 1), 1.0).sum() == 0  # not nan
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75]) and abs(y.mean() - 1) < 0.02
    model, x = net(drop_path=0.5), torch.randn(4, 3, 32, 32)
    close(model(x), model(x))
    assert not torch.allclose(model.train()(x), model(x))


@torch.no_grad()
def test_torch_export_takes_any_number_of_images():
    net, x = vit.ViT(16, 4, **vit.SIZES["test"]).eval(), torch.randn(5, 3, 16, 16)
    exported = torch.export.export(net, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for ways in (exported, torch.jit.trace(net, x[:2])):
        close(ways(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_takes_any_number_of_images():
    net, x = vit.ViT(16, 4, **vit.SIZES["test"]).eval(), torch.randn(5, 3, 16, 16)
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (x[:2],), "vit.onnx", dynamo=True, dynamic_shapes=shapes, input_names=["images"])
    found = onnxruntime.InferenceSession("vit.onnx").run(None, dict(images=x.numpy()))[0]
    close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [16, 24])
@torch.no_grad()
def test_half_precision_at_any_size(dtype, side):
    low, x = vit.ViT(16, 4, **vit.SIZES["test"]).eval(), torch.randn(2, 3, side, side)
    expected = low(x)
    low.to(dtype)
    assert low(x.to(dtype)).dtype == low.cls(x.to(dtype)).dtype == low.attention(x.to(dtype)).dtype == dtype
    close(low(x.to(dtype)).float(), expected, rtol=0.1, atol=0.1)
