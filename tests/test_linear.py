"""Linear probe and fine-tuning: heads equal to heads trained alone, token dropping, the scripts themselves."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails, start, tiny
from torch import nn

import dino
import eval_linear
import mae_pcae
import vit

close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_heads_side_by_side_equal_heads_alone():
    """One at a time, by torch's own SGD with that learning rate."""
    x, y, rates = torch.randn(96, 8), torch.arange(96) % 3, [0.01, 0.1, 1.0]
    pairs = [(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)] * 4
    ours = eval_linear.train_heads(pairs, 12, 8, 3, rates, 32, torch.device("cpu"))(x)
    for rate, logits in zip(rates, ours, strict=True):
        norm, head = nn.BatchNorm1d(8, affine=False, eps=1e-6), nn.Linear(8, 3)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), momentum=0.9, lr=0)
        for step, (a, b) in enumerate(pairs):
            optimizer.param_groups[0]["lr"] = rate * 32 / 256 * (1 + np.cos(np.pi * step / 12)) / 2
            optimizer.zero_grad()
            F.cross_entropy(head(norm(a)), b).backward()
            optimizer.step()
        close(logits, head(norm.eval()(x)).detach())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_tokens_most_like_the_mean_are_dropped(ratio):
    x = torch.randn(3, 11, 8)
    out = eval_linear.drop_tokens(x, ratio)
    assert out.shape == (3, 1 + int(10 * (1 - ratio) + 1e-6), 8)
    for b in range(3):
        assert torch.equal(out[b, 0], x[b, 0])  # CLS stays
        patches = x[b, 1:]
        like = torch.stack([F.cosine_similarity(t, patches.mean(0), dim=0) for t in patches])
        kept = patches[like.argsort()[: len(out[b]) - 1].sort()[0]]
        close(out[b, 1:].sort(dim=0)[0], kept.sort(dim=0)[0])


def test_macs_are_those_of_the_fact_sheet():
    """ViT-B/16, 224 px, blocks 3, 6 and 9: 17.56, 15.16, 13.09, 11.38, 9.92 G (PCAE's Table 5: 17.57 to 9.53)."""
    config = dict(vit.SIZES["base"], patch=16, in_chans=3)
    found = [eval_linear.macs(config, (224, 224), r / 10, 1000) / 1e9 for r in range(5)]
    assert [round(m, 2) for m in found] == [17.56, 15.16, 13.09, 11.38, 9.92]
    assert eval_linear.stages_of(12) == [3, 6, 9] and eval_linear.stages_of(6) == [1, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("feature", ["cls", "mean", "both"])
def test_without_dropping_it_is_the_encoder_and_a_linear_layer(feature):
    net = vit.ViT(16, 4, **vit.SIZES["test"]).eval()
    model, x = eval_linear.Classifier(net, 5, feature).eval(), torch.randn(3, 3, 16, 16)
    close(model(x), model.head(eval_linear.Reader(net, 1).encode(x, feature)))
    layers = eval_linear.Reader(net, 2).encode(x, feature)
    assert layers.shape == (3, 2 * model.head.in_features)
    parts = dict(cls=lambda t: t[:, 0], mean=lambda t: t[:, 1:].mean(1))
    parts["both"] = lambda t: torch.cat([parts["cls"](t), parts["mean"](t)], dim=1)
    close(layers[:, model.head.in_features :], parts[feature](net(x)))


def test_layer_decay():
    net = eval_linear.Classifier(vit.ViT(16, 4, **vit.SIZES["test"]), 5, "cls")
    factor = {
        id(p): (g["factor"], g["weight_decay"]) for g in eval_linear.layer_groups(net, 0.5, 0.1) for p in g["params"]
    }
    assert factor[id(net.head.weight)] == (1.0, 0.1) and factor[id(net.head.bias)] == (1.0, 0.0)
    assert factor[id(net.vit.norm.weight)] == (1.0, 0.0)
    assert factor[id(net.vit.blocks[1].mlp.fc1.weight)] == (0.5, 0.1)
    assert factor[id(net.vit.blocks[0].mlp.fc1.weight)] == (0.25, 0.1)
    assert factor[id(net.vit.patch_embed["proj"].weight)] == (0.125, 0.1)
    assert factor[id(net.vit.pos_embed)] == (0.125, 0.0)
    assert len(factor) == sum(p.requires_grad for p in net.parameters())


def test_mixup_against_a_loop():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x, y, w = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1]), torch.rand(6)
    total = 0
    for i in range(6):
        j = i + 1 if i % 2 == 0 else i - 1
        logits = net((w[i] * x[i] + (1 - w[i]) * x[j])[None])
        soft = w[i] * F.one_hot(y[i], 4) + (1 - w[i]) * F.one_hot(y[j], 4)
        total -= ((soft * 0.8 + 0.2 / 4) * logits.log_softmax(-1)).sum()
    close(eval_linear.mixed_loss(net, x, y, w, 0.2), total / 6)


def test_a_share_of_the_labels_is_fixed_and_even():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 3)
    chosen = eval_linear.share_of_labels(labels, 0.1)
    assert torch.equal(chosen, eval_linear.share_of_labels(labels, 0.1))
    assert labels[chosen].bincount().tolist() == [6, 3, 1]  # a class is never left without
    assert sorted(eval_linear.share_of_labels(labels, 1.0).tolist()) == list(range(93))
    assert labels[eval_linear.share_of_labels(labels, 1.0)[-9:]].unique().numel() > 1  # the held-out tenth is mixed


@pytest.fixture
def run(npz):
    dino.main(tiny("--steps", 2))
    return ["run/last.pt", "--device", "cpu", "--batch", "16", "--precision", "fp32"]


def test_probe(run, capsys):
    capsys.readouterr()
    result = eval_linear.main([*run, "--epochs", "20"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["linear"] > 60 and set(result["tried"]) == {"0.003", "0.01", "0.03", "0.1", "0.3", "1", "3"}
    assert result["tried"][f"{result['rate']:g}"] == max(result["tried"].values())
    assert eval_linear.main([*run, "--epochs", "20"]) == result
    more = eval_linear.main(
        [*run, "--epochs", "2", "--feature", "both", "--layers", "2", "--augment", "--labels", "0.5"]
    )
    assert more["feature"] == "both" and more["layers"] == 2 and more["train"] == 64


def test_finetune(run, capsys):
    first = eval_linear.main([*run, "--finetune", "--epochs", "15", "--mixup", "0", "--lr", "0.05"])
    assert first["finetuned"] > 60 and not first["scratch"]
    again = eval_linear.main([*run, "--finetune", "--epochs", "15", "--mixup", "0", "--lr", "0.05"])
    assert {k: v for k, v in again.items() if k not in ("minutes", "training_images_per_s")} == {
        k: v for k, v in first.items() if k not in ("minutes", "training_images_per_s")
    }
    less = eval_linear.main([*run, "--finetune", "--epochs", "1", "--drop-ratio", "0.5", "--scratch"])
    assert less["gmacs"] <= first["gmacs"] and less["speed"] > 0 and less["scratch"]


def test_encoders_of_every_method_are_read(npz):
    mae_pcae.main(tiny("--steps", 1, method="mae"))
    result = eval_linear.main(["run/last.pt", "--device", "cpu", "--epochs", "1", "--finetune", "--img-size", "24"])
    assert result["feature"] == "mean"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--epochs", "3"], ["--epochs", "2", "--augment"], ["--finetune", "--epochs", "2", "--drop-path", "0"]]
)
def test_two_processes_give_the_same(run, options):
    one, two = (start("eval_linear.py", *run, *options, processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr
    a, b = (json.loads(p.stdout.splitlines()[-1]) for p in (one, two))
    key = "finetuned" if "--finetune" in options else "linear"
    assert a[key] == pytest.approx(b[key], abs=4.2)  # one of 24 test images


@pytest.mark.parametrize(
    "options,message",
    [
        ([], "no checkpoint given"),
        (["nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["run/last.pt", "--scratch"], "of --finetune; add it"),
        (["run/last.pt", "--labels", "0"], "must be in"),
        (["run/last.pt", "--lr", "9"], "--lr: of --finetune; add it"),
        (["run/last.pt", "--finetune", "--layers", "2", "--augment"], "--layers, --augment: of the probe alone"),
        (["run/last.pt", "--finetune", "--drop-path", "1"], "--drop-path must be in [0, 1)"),
        (["run/last.pt", "--finetune", "--seed", "-1"], "--seed and --mixup must be 0 or more"),
        (["run/last.pt", "--finetune", "--batch", "1"], "--batch 1 of 64 training images is too few"),
        (["run/last.pt", "--finetune", "--lr", "1e5", "--epochs", "3"], "lower --lr"),
        (["run/last.pt", "--batch", "1"], "BatchNorm needs two in a batch"),
        (["run/last.pt", "--layers", "9"], "this encoder has 2 blocks"),
        (["run/last.pt", "--data", "nowhere"], "no such .npz file or folder"),
    ],
)
def test_wrong_input(run, capsys, options, message):
    assert message in fails(eval_linear.main, options, capsys)
