"""Linear probe and fine-tuning: heads equal to heads trained alone, token dropping, the scripts themselves."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import dino
import embed
import finetune
import linear
import mae_pcae
import vit
from conftest import checkpoint, close, fails, log, pictures, same, start, tensors, tiny


def test_heads_side_by_side_equal_heads_alone():
    """One at a time, by torch's own SGD with that learning rate."""
    x, y, rates = torch.randn(96, 8), torch.arange(96) % 3, [0.01, 0.1, 1.0]
    pairs = [(x[i : i + 32], y[i : i + 32]) for i in (0, 32, 64)] * 4
    norm, weight, bias = linear.train_heads(pairs, 12, 8, 3, rates, 32, torch.device("cpu"))
    ours = norm(x) @ weight + bias
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
    out = linear.drop_tokens(x, ratio)
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
    found = [finetune.macs(config, (224, 224), r / 10, 1000) / 1e9 for r in range(5)]
    assert [round(m, 2) for m in found] == [17.56, 15.16, 13.09, 11.38, 9.92]
    assert linear.stages_of(12) == [3, 6, 9] and linear.stages_of(6) == [1, 3, 4]


@torch.no_grad()
@pytest.mark.parametrize("feature", ["cls", "mean", "both"])
def test_without_dropping_it_is_the_encoder_and_a_linear_layer(feature):
    net = vit.ViT(16, 4, **vit.SIZES["test"]).eval()
    model, x = linear.Classifier(net, 5, feature).eval(), torch.randn(3, 3, 16, 16)
    close(model(x), model.head(net.encode(x, feature)))
    layers = linear.Classifier(net, 5, feature, layers=2).eval().encode(x)
    assert layers.shape == (3, 2 * model.head.in_features)
    parts = dict(cls=lambda t: t[:, 0], mean=lambda t: t[:, 1:].mean(1))
    parts["both"] = lambda t: torch.cat([parts["cls"](t), parts["mean"](t)], dim=1)
    close(layers[:, model.head.in_features :], parts[feature](net(x)))


def test_layer_decay():
    net = linear.Classifier(vit.ViT(16, 4, **vit.SIZES["test"]), 5, "cls")
    groups = finetune.layer_groups(net, 0.5, 0.1)
    factor = {id(p): (g["factor"], g["weight_decay"]) for g in groups for p in g["params"]}
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
    close(finetune.mixed_loss(net, x, y, w, 0.2), total / 6)


def test_a_share_of_the_labels_is_even_and_depends_on_the_seed():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 3)
    chosen = linear.share_of_labels(labels, 0.1)
    assert chosen == linear.share_of_labels(labels, 0.1) != linear.share_of_labels(labels, 0.1, seed=1)
    assert labels[chosen].bincount().tolist() == [6, 3, 1]  # a class is never left without
    assert sorted(linear.share_of_labels(labels, 1.0)) == list(range(93))
    assert labels[linear.share_of_labels(labels, 1.0)[-9:]].unique().numel() > 1  # the held-out tenth is mixed


@pytest.fixture
def run(npz):
    dino.main(tiny("--steps", 2))
    return ["run/last.pt", "--device", "cpu", "--batch", "16", "--precision", "fp32"]


def test_probe(run, capsys):
    capsys.readouterr()
    result = linear.main([*run, "--epochs", "20"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result and result["task"] == "linear"
    found = result["results"]
    assert found["linear"] > 60 and found["untrained"] > 40 and found["pixels"] > 40  # classes are plain to see
    assert len(found["tried"]) == len(linear.RATES)
    assert found["tried"][f"{found['rate']:g}"] == max(found["tried"].values())
    assert linear.main([*run, "--epochs", "20"]) == result


def test_few_labels_are_drawn_anew_for_each_seed(run):
    options = [*run, "--epochs", "5", "--labels", "0.2"]
    each = [linear.main([*options, "--seed", s])["results"] for s in "012"]
    all_of = linear.main([*options, "--seeds", "3"])["results"]
    assert all_of["linear_each"] == [r["linear"] for r in each] and each[0]["train"] == all_of["train"] == 12
    assert all_of["linear"] == pytest.approx(np.mean(all_of["linear_each"]), abs=0.01)
    assert all_of["linear_sd"] == pytest.approx(np.std(all_of["linear_each"], ddof=1), abs=0.01)


def test_probe_of_several_layers(run):
    more = linear.main([*run, "--epochs", "2", "--feature", "both", "--layers", "2"])
    assert more["results"]["feature"] == "both" and more["args"]["layers"] == 2 and more["results"]["train"] == 64


def test_a_rate_at_the_end_of_the_grid_is_named(run, capsys):
    linear.main([*run, "--epochs", "3", "--rates", "1e-4", "1"])
    assert "is the first or the last: try a wider range" in capsys.readouterr().out


@pytest.mark.parametrize("script,epochs", [(linear, "10"), (finetune, "4")])
def test_what_was_trained_is_saved_and_applied_to_another_set(run, script, epochs, capsys):
    """By the names of classes: on a set of two of the three, in another order, only these can be predicted."""
    found = script.main([*run, "--epochs", epochs, "--out", "probe"])["results"]
    apply = lambda *more: linear.main(["probe/classifier.pt", "--device", "cpu", "--precision", "fp32", *more])
    same = apply()
    assert same["task"] == "classifier"
    assert same["results"]["accuracy"] == pytest.approx(found.get("linear", found.get("finetuned")), abs=0.01)
    (x, y), (a, b) = pictures(24, seed=1), pictures(8)
    np.savez("two.npz", images=x[y > 0], labels=y[y > 0])
    two = apply("--data", "two.npz")["results"]
    assert two["classes"] == 2 and two["test"] == (y > 0).sum()  # all of them: none is for training
    np.savez("new.npz", images=a, labels=b + 5)
    argv = ["probe/classifier.pt", "--data", "new.npz", "--device", "cpu"]
    assert "classes that were not trained: 5, 6" in fails(linear.main, argv, capsys)
    np.savez("all.npz", images=x, labels=y)
    Path("photos").mkdir()
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        Image.fromarray(image).save(f"photos/{label}-{i}.png")
    unlabelled = ["photos", "--out", "classes.csv", "--device", "cpu", "--precision", "fp32"]
    embed.main(["probe/classifier.pt", *unlabelled])
    with open("classes.csv") as f:
        rows = list(csv.DictReader(f))
    right = [row["class"] == Path(row["file"]).name[0] for row in rows]
    assert len(rows) == 24 and all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    assert 100 * np.mean(right) == pytest.approx(apply("--data", "all.npz")["results"]["accuracy"], abs=0.01)
    assert "a .csv needs a classifier" in fails(embed.main, ["run/last.pt", *unlabelled], capsys)


@pytest.mark.parametrize("feature,norm", [("mean", "layer"), ("cls", "none")])
def test_mean_tokens_get_a_norm_of_their_own(run, feature, norm):
    found = finetune.main([*run, "--epochs", "1", "--feature", feature])["results"]
    assert found["norm"] == norm
    state = vit.load_checkpoint("runs/finetune-run/classifier.pt")["classifier"]
    assert ("norm.weight" in state) == (norm == "layer") == ("vit.norm.weight" not in state)


def test_finetune_is_repeatable_resumes_and_logs(run):
    options = [*run, "--epochs", "15", "--mixup", "0", "--lr", "0.05"]
    first = finetune.main([*options, "--out", "a"])["results"]
    assert first["finetuned"] > 60 and not first["scratch"] and first["gmacs"] > 0
    rows = log("a")
    assert [r["epoch"] for r in rows if "accuracy" in r] == list(range(1, 16))
    assert rows[-1]["accuracy"] == first["finetuned"] and Path("a/curve.png").exists()
    real, seen = finetune.save, []

    def killed(*parts):
        real(*parts)
        seen.append(parts)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "save", killed)
        patch.setattr(vit, "SAVE_EVERY", 0)
        finetune.main([*options, "--out", "b"])
    assert finetune.main([*options, "--out", "b"])["results"]["finetuned"] == first["finetuned"]
    assert same(checkpoint("a"), checkpoint("b")) == []


def test_another_image_size_is_that_of_the_saved_classifier(run):
    options = [*run, "--epochs", "2", "--img-size", "24", "--out", "larger"]
    found = linear.main(options)["results"]
    net, config = vit.load_encoder("larger/classifier.pt")
    assert config["img_size"] == [24, 24] and net.pos_embed.shape[1] == 37
    again = linear.main(["larger/classifier.pt", "--device", "cpu", "--precision", "fp32"])["results"]
    assert again["accuracy"] == pytest.approx(found["linear"], abs=0.01)


def test_fine_tuning_of_another_encoder_is_not_taken_for_this_one(run, capsys):
    options = [*run, "--epochs", "1"]
    finetune.main(options)
    dino.main(tiny("--steps", 3))
    assert "runs/finetune-run holds a run with --encoder" in fails(finetune.main, options, capsys)


def test_positions_are_trained_wherever_they_come_from(npz):
    mae_pcae.main(tiny("--steps", 1, method="mae"))  # fixed sine-cosine positions
    before = checkpoint()["encoder"]["pos_embed"]
    options = ["run/last.pt", "--device", "cpu", "--batch", "16", "--epochs", "2", "--out", "f"]
    assert finetune.main(options)["results"]["feature"] == "mean"
    after, config = vit.load_encoder("f/last.pt")  # an encoder whose final norm went into the classifier
    assert not torch.equal(before, after.pos_embed) and not config["norm"]


@pytest.mark.slow
def test_dropping_tokens_costs_less(run):
    """The count of MACs is exact."""
    few = finetune.main([*run, "--epochs", "1", "--drop-ratio", "0.5", "--scratch"])["results"]
    config = vit.load_encoder("run/last.pt")[1]
    assert few["gmacs"] == pytest.approx(finetune.macs(config, (16, 16), 0.5, 3) / 1e9, abs=1e-4)
    assert few["scratch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script,options",
    [("eval_knn", ""), ("evaluation/linear", "--epochs 3"), ("evaluation/finetune", "--epochs 2 --drop-path 0")],
)
def test_two_processes_give_the_same(run, script, options):
    """k-NN, linear probes and fine-tuning, up to one of 24 test images, where rounding decides."""
    out = lambda n: ["--out", ("one", "two")[n - 1]] if options else []
    one, two = (start(f"{script}.py", *run, *options.split(), *out(n), processes=n) for n in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr
    a, b = (json.loads(p.stdout.splitlines()[-1])["results"] for p in (one, two))
    for name in {"pixels", "untrained", "cls", "mean", "linear", "finetuned"} & a.keys():
        assert a[name] == pytest.approx(b[name], abs=4.2)
    if script == "evaluation/finetune":  # the same gradients: weights agree up to AdamW's rounding
        one, two = (tensors(checkpoint(out)["net"]) for out in ("one", "two"))
        for k, v in one.items():
            if not k.endswith("qkv.bias"):
                close(v, two[k], rtol=1e-4, atol=1e-5, msg=k)
