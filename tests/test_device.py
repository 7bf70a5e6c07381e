"""A GPU without a GPU: fake tensors know their device but hold no numbers.

They find what was left on the CPU and what would wait for the GPU. With TEST_DEVICE=cuda the whole suite runs on one.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import analyze
import dino
import mae_pcae
import siameseim
import vit
from conftest import MODULE, NETWORK, network, step_once

pytestmark = pytest.mark.fake
everywhere = pytest.mark.parametrize("method", NETWORK)


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=False)


def on_gpu(mode, net):
    """The network with fake parameters and buffers on "cuda"; to be called outside of the mode."""
    for module in net.modules():
        for store in (module._parameters, module._buffers):
            for name, t in store.items():
                fake = mode.from_tensor(t.detach())
                with mode:
                    fake = fake.to("cuda")
                    store[name] = torch.nn.Parameter(fake, t.requires_grad) if store is module._parameters else fake
    return net


def images(n=8, channels=3):
    return torch.zeros(n, channels, 16, 16, dtype=torch.uint8, device="cuda")


@everywhere
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_stays_on_the_gpu_and_does_not_wait_for_it(method, mode, accumulate, monkeypatch):
    """.item(), bool(tensor) and the like raise on fake tensors; mixed devices too."""
    net, args = network("--accumulate", accumulate, "--precision", "bf16", method=method)
    module = MODULE[method]
    draws = module.sample_step(args, 0, 16)
    fake = lambda d: {k: mode.from_tensor(v) for k, v in d.items()}
    draws = fake(draws) if isinstance(draws, dict) else [fake(d) for d in draws]
    net = on_gpu(mode, net)
    with mode:
        to = lambda d: {k: v.to("cuda") for k, v in d.items()}
        draws = to(draws) if isinstance(draws, dict) else [to(d) for d in draws]
        monkeypatch.setattr(module, "sample_step", lambda *_: draws)

        def backward(loss):  # autograd's own needs a real GPU; what it would leave behind
            assert loss.device.type == "cuda" and loss.grad_fn is not None
            for p in net.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        stats = step_once(net, args, images())
        assert stats.device.type == "cuda" and all(p.device.type == "cuda" for p in net.state_dict().values())


@pytest.mark.parametrize("pos", ["learned", "sincos"])
def test_features_and_knn_on_a_gpu(pos, mode, monkeypatch):
    """k-NN waits for the number of classes, which is given here."""
    encoder = vit.ViT(16, 4, pos=pos, **vit.SIZES["test"])
    config = dict(encoder.config, mean=[0.5] * 3, std=[0.3] * 3)
    encoder = on_gpu(mode, encoder.eval())
    with mode:
        x, labels = vit.prepare(images(), config), torch.zeros(8, dtype=torch.int64, device="cuda")
        found = [encoder.encode(x, part) for part in ("cls", "mean", "both")]
        found += [vit.pixels(x), vit.attention_mask(encoder.attention(x)[:, :, 0, 1:])]
        monkeypatch.setattr(vit, "in_order", lambda *_: None)
        monkeypatch.setattr(vit, "stream", lambda *_: [images()])
        found += [vit.features(encoder.encode, range(8), config, torch.device("cuda"))]
        for name, value in dict(__bool__=lambda _: True, __int__=lambda _: 2).items():
            monkeypatch.setattr(type(labels), name, value)
        found += [vit.knn_hits(found[-1], labels, found[-1], labels)[20]]
        assert len(found) == 7 and all(t.device.type == "cuda" for t in found)


def test_measures_on_a_gpu(mode):
    with mode:
        maps, tokens = torch.zeros(2, 3, 17, 17, device="cuda"), torch.zeros(2, 16, 8, device="cuda")
        found = [measure(maps) for measure in (analyze.nmi, analyze.query_similarity, analyze.head_similarity)]
        found += [analyze.attention_distance(maps, 4, (4, 4)), analyze.fourier_log_amplitude(tokens, (4, 4))]
        found += [analyze.mean_cosine(tokens), analyze.effective_rank(analyze.singular_values(tokens))]
        assert all(x.device.type == "cuda" for x in found)


@everywhere
def test_pictures_on_a_gpu(method, mode, monkeypatch):
    """Up to the point where they are written."""
    net, args = network(method=method)
    seen = []
    for module in (dino, mae_pcae, siameseim):
        monkeypatch.setattr(module, "save_grid", lambda columns, *_: seen.extend(columns.values()))
    monkeypatch.setattr(siameseim, "draw_bounding_boxes", lambda img, *_, **__: img)
    draws = siameseim.sample_step(args, 0, 16).items() if method == "siameseim" else ()
    draws = {k: mode.from_tensor(v) for k, v in draws}
    noise = mode.from_tensor(torch.rand(4, 16))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: noise)
    net = on_gpu(mode, net).eval()
    with mode:
        x = torch.zeros(4, 3, 16, 16, device="cuda")
        if method in ("dino", "hybrid"):
            dino.save_grid(dino.attention_columns(dino.cls_attention(net.teacher.vit, x), x), "x.png")
        if method in ("mae", "pcae", "hybrid"):
            mae_pcae.draw(net.mae if method == "hybrid" else net, x, "x.png")
        if method == "siameseim":
            siameseim.draw_pairs(net, images(4), draws, args, "x.png")
        assert len(seen) >= 3


@pytest.mark.gpu
@everywhere
def test_no_blocking_copies_in_a_step(method):
    net, args = network(method=method)
    net, imgs = net.cuda(), torch.zeros(8, 3, 16, 16, dtype=torch.uint8, device="cuda")
    module, parts = MODULE[method], vit.adamw(net, args.precision)
    schedule = SimpleNamespace(lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
    draws = vit.shard(module.sample_step(args, 0, 16), "cuda")
    module.train_step(net, *parts, imgs, draws, schedule, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.train_step(net, *parts, imgs, draws, schedule, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
