"""DINO: its loss against the slow double loop of the paper, its update rules, its ablations, its pictures."""

import math

import pytest
import torch
import torch.nn.functional as F

import dino
import vit
from conftest import NETWORK, checkpoint, close, log, losses, network, step_once, tensors, tiny


def outputs(views=5, batch=3, k=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(views, batch, k, generator=g), torch.randn(2, batch, k, generator=g), torch.randn(k, generator=g)


@pytest.mark.parametrize("views", [2, 3, 8])
def test_loss_is_the_mean_cross_entropy_over_pairs_of_different_views(views):
    s, t, c = outputs(views)
    pairs, entropies = [], []
    for i in range(2):
        for j in range(views):
            for b in range(s.shape[1]):
                p = F.softmax((t[i, b] - c) / 0.04, dim=0)
                if i != j:
                    pairs.append(-(p * F.log_softmax(s[j, b] / 0.1, dim=0)).sum())
                entropies.append(-(p * p.clamp(min=1e-30).log()).sum())
    loss, entropy, kl = dino.dino_loss(s, t, c)
    torch.testing.assert_close(kl, loss - entropy)
    close(loss, torch.stack(pairs).mean())
    close(entropy, torch.stack(entropies).mean(), rtol=1e-4, atol=1e-5)


def test_kl_vanishes_in_both_collapses():
    k = 32
    uniform = torch.zeros(4, 3, k)
    one_hot = torch.zeros(4, 3, k).index_fill_(2, torch.tensor([5]), 10.0)
    for outputs, expected in ((uniform, math.log(k)), (one_hot, 0)):
        found = dino.dino_loss(outputs, outputs[:2], torch.zeros(k))
        close(torch.stack(found), torch.tensor([expected, expected, 0.0]))
    assert "uniform" in dino.collapse_warning(math.log(k), 0.0, k) and "one prototype" in dino.collapse_warning(
        0.0, 0.0, k
    )
    assert dino.collapse_warning(1.5, 0.5, k) is None


@pytest.mark.parametrize("name", ["mse", "infonce"])
def test_other_losses_against_a_loop(name):
    s, t, c = outputs(4)
    s2, t2 = F.normalize(s, dim=-1), F.normalize(t - c, dim=-1)
    pairs = []
    for i in range(2):
        for j in range(4):
            for b in range(3):
                if i != j and name == "mse":
                    pairs.append((s2[j, b] - t2[i, b]).square().sum())
                elif i != j:
                    similar = torch.stack([s2[j, b] @ t2[i, other] / 0.1 for other in range(3)])
                    pairs.append(-F.log_softmax(similar, dim=0)[b])
    close(dino.pairwise(s, t - c, dino.OTHER_LOSSES[name]), torch.stack(pairs).mean())


def test_head_prototypes_have_unit_norm_unless_told_otherwise():
    head = dino.DINOHead(8, 6, hidden=16, bottleneck=4)
    x = torch.randn(3, 8)
    before = head(x)
    head.prototypes.data *= torch.rand(6, 1) + 0.5  # their length does not matter
    torch.testing.assert_close(head(x), before)
    assert before.abs().max() <= 1 + 1e-5  # a cosine
    assert not head.weight_g.requires_grad and dino.DINOHead(8, 6, norm_last_layer=False).weight_g.requires_grad


@pytest.fixture
def two():
    """Two parameters with gradients far from one, and their optimizer and scaler."""
    net = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))])
    optimizer, scaler = vit.adamw(net, "fp32")
    return net, optimizer, scaler


def test_clipping_is_of_each_parameter_and_the_step_is_adamw(two):
    (a, b), optimizer, scaler = two
    twin = [torch.nn.Parameter(p.detach().clone()) for p in (a, b)]
    adam = torch.optim.AdamW([dict(params=twin[:1]), dict(params=twin[1:])], lr=0.1, weight_decay=0.0)
    for scale in (100.0, 1e-3, 2.0):
        ga, gb = torch.randn(3, 2) * scale, torch.randn(4)
        a.grad, b.grad = ga.clone(), gb.clone()
        norm, finite = vit.optimizer_step(optimizer, scaler, 0.1, 0.0, 3.0, per_parameter=True)
        assert finite == 1
        for p, g in zip(twin, (ga, gb), strict=True):
            p.grad = g * min(1, 3.0 / (g.norm().item() + 1e-6))
        adam.step()
        assert norm.item() == pytest.approx(torch.cat([ga.flatten(), gb]).norm().item(), rel=1e-5)
        for p, q in zip((a, b), twin, strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("clip", [0.0, 1.0, 100.0])
def test_clipping_all_together(two, clip, monkeypatch):
    (a, b), optimizer, scaler = two
    a.grad, b.grad = torch.full((3, 2), 2.0), torch.full((4,), 3.0)
    before, seen = torch.cat([a.grad.flatten(), b.grad]), []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append(torch.cat([a.grad.flatten(), b.grad])))
    vit.optimizer_step(optimizer, scaler, 0.1, 0.0, clip)
    close(seen[0], before / before.norm() if clip == 1 else before)


def test_weight_decay_is_of_matrices_alone(two):
    (a, b), optimizer, scaler = two
    a.grad, b.grad = torch.zeros(3, 2), torch.zeros(4)
    vit.optimizer_step(optimizer, scaler, 0.1, 0.5, 0.0)
    assert torch.allclose(a, torch.full((3, 2), 0.95)) and torch.equal(b, torch.ones(4))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("method", NETWORK)
def test_a_gradient_that_is_not_finite_moves_nothing(npz, method, bad):
    """Weights, teacher, centre and the optimiser's own state; the next step moves them."""
    net, args = network(method=method)
    imgs = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    moved = lambda: {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    real = net.augment
    net.augment = lambda *a: real(*a) * bad
    step_once(net, args, imgs)
    assert not moved()
    net.augment = real
    step_once(net, args, imgs)
    assert len(moved()) > 20 and all(v.isfinite().all() for v in net.state_dict().values())


def test_a_bad_batch_is_counted(npz, monkeypatch):
    real, steps = dino.optimizer_step, []

    def poisoned(optimizer, *rest, **how):
        steps.append(1)
        if len(steps) in (3, 4):
            optimizer.param_groups[0]["params"][0].grad[:] = float("nan")
        return real(optimizer, *rest, **how)

    monkeypatch.setattr(dino, "optimizer_step", poisoned)
    dino.main(tiny("--steps", 6))
    assert [r["skipped"] for r in log() if "skipped" in r] == [0, 0, 1, 2, 2, 2]
    assert log()[4]["grad_norm"] is None and all(math.isfinite(v) for v in losses().values())


def test_the_last_layer_is_frozen_in_the_first_epoch(npz):
    prototypes = []
    for steps in (1, 8, 10):
        dino.main(tiny("--steps", steps, "--freeze-last-layer", 1))
        prototypes.append(checkpoint()["net"]["student.head.prototypes"])
    assert torch.equal(prototypes[0], prototypes[1]) and not torch.equal(prototypes[1], prototypes[2])


def test_a_run_of_bad_batches_ends_with_the_reason(npz, monkeypatch):
    real = dino.augment
    monkeypatch.setattr(dino, "augment", lambda *a: real(*a) * float("nan"))
    why = "stopped at step 20: 20 steps in a row had a gradient that is not finite; try a lower --lr"
    with pytest.raises(SystemExit, match=why):
        dino.main(tiny())


CHANGES = {"no-centering": {"center_momentum"}, "no-sharpening": {"teacher_temp"}, "no-momentum": {"momentum"}}
CHANGES["no-multicrop"] = {"local_crops", "global_scale"}


@pytest.mark.parametrize("name", dino.ABLATIONS)
def test_ablations_change_one_thing_and_run(npz, name):
    assert dino.ABLATIONS[name].keys() == CHANGES.get(name, set())
    assert hasattr(dino, f"{name}_loss") == (name not in CHANGES)
    options = " ".join(tiny("--ablate", name, "--steps", 3)).replace("--local-crops 2 ", "")  # which one of them sets
    assert math.isfinite(dino.main(options.split())["loss"])
    found = log()[0]["args"]
    assert all(found[k] == v for k, v in dino.ABLATIONS[name].items())


def test_without_momentum_the_teacher_is_the_student_and_without_centring_the_centre_stays(npz):
    dino.main(tiny("--ablate", "no-momentum", "--steps", 12))
    found = tensors(checkpoint()["net"])
    for k, v in found.items():
        if k.startswith("/teacher."):
            close(v, found[k.replace("/teacher", "/student")], rtol=0, atol=1e-6)
    assert checkpoint()["net"]["center"].any()
    dino.main(tiny("--ablate", "no-centering", "--steps", 3, out="other"))
    assert not checkpoint("other")["net"]["center"].any()


def test_schedules():
    args = network("--momentum", 0.98, "--teacher-temp", 0.02, 0.06, "--teacher-temp-epochs", 5)[1]
    args.epochs = 10
    found = [dino.schedules(step, 100, 10, args) for step in range(101)]
    assert [found[i].momentum for i in (0, 50, 100)] == pytest.approx([0.98, 0.99, 1.0])
    assert [found[i].teacher_temp for i in (0, 49, 99)] == pytest.approx([0.02, 0.06, 0.06])
    assert [found[i].weight_decay for i in (0, 100)] == pytest.approx([0.04, 0.4])
    assert [s.freeze_last_layer for s in found[:12]] == [True] * 10 + [False] * 2
    assert found[9].lr == pytest.approx(args.lr * 8 / 256) and found[100].lr == pytest.approx(1e-6)


def test_attention_mask_holds_the_mass_with_as_few_patches_as_can_be():
    maps = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    assert vit.attention_mask(maps).tolist() == [False, True, False, True, False]
    maps = torch.rand(4, 3, 50)
    mask = vit.attention_mask(maps, 0.6)
    share = (maps * mask).sum(-1) / maps.sum(-1)
    smallest = maps.masked_fill(~mask, 9).amin(-1) / maps.sum(-1)
    assert (share >= 0.6).all() and (share - smallest < 0.6).all()


def test_collapse_is_named(npz, capsys):
    dino.main(tiny("--lr", 0, "--teacher-temp", 10, "--steps", 20))
    assert "COLLAPSED, uniform output for all images" in capsys.readouterr().out
    assert "targets are nearly one-hot" in dino.collapse_warning(
        0.08, 0.45, 1024
    )  # seen on photos, while k-NN stood still
    assert dino.collapse_warning(1.0, 0.7, 1024) is None and "one prototype" in dino.collapse_warning(0.01, 0.02, 1024)
    dino.main(tiny("--teacher-temp", 0.02, "--steps", 20, out="healthy"))
    assert "COLLAPSED" not in capsys.readouterr().out
