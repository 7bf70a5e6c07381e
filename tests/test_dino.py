"""DINO: its loss against the slow double loop of the paper, its update rules, its ablations, its pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import log, losses, tiny
from PIL import Image

import dino


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
    loss, entropy, kl = dino.dino_loss(s, t, c, 0.1, 0.04)
    torch.testing.assert_close(kl, loss - entropy)
    torch.testing.assert_close(loss, torch.stack(pairs).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, torch.stack(entropies).mean(), rtol=1e-4, atol=1e-5)


def test_kl_vanishes_in_both_collapses():
    k = 32
    uniform = torch.zeros(4, 3, k)
    loss, entropy, _ = dino.dino_loss(uniform, uniform[:2], torch.zeros(k))
    assert loss.item() == pytest.approx(math.log(k), abs=1e-5) and entropy.item() == pytest.approx(
        math.log(k), abs=1e-5
    )
    one_hot = torch.zeros(4, 3, k).index_fill_(2, torch.tensor([5]), 10.0)
    loss, entropy, _ = dino.dino_loss(one_hot, one_hot[:2], torch.zeros(k))
    assert loss.item() == pytest.approx(0, abs=1e-5) and entropy.item() == pytest.approx(0, abs=1e-5)
    assert "uniform" in dino.collapse(math.log(k), 0.0, k) and "one prototype" in dino.collapse(0.0, 0.0, k)
    assert dino.collapse(1.5, 0.5, k) is None


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
    loss, _, _ = (dino.mse_loss if name == "mse" else dino.infonce_loss)(s, t, c)
    torch.testing.assert_close(loss, torch.stack(pairs).mean(), rtol=1e-5, atol=1e-5)


def test_head_prototypes_have_unit_norm_unless_told_otherwise():
    head = dino.DINOHead(8, 6, hidden=16, bottleneck=4)
    x = torch.randn(3, 8)
    before = head(x)
    head.prototypes.data *= torch.rand(6, 1) + 0.5  # their length does not matter
    torch.testing.assert_close(head(x), before)
    assert before.abs().max() <= 1 + 1e-5  # a cosine
    assert not head.length.requires_grad and dino.DINOHead(8, 6, norm_last_layer=False).length.requires_grad


def update_for(params, precision="fp32"):
    module = torch.nn.ParameterList(params)
    update = dino.Update([module], torch.device("cpu"), precision)
    update.set(0.1, 0.0)
    return module, update


def test_clipping_is_of_each_tensor_and_the_step_is_adamw():
    (a, b), update = update_for([torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))])
    twin = [torch.nn.Parameter(p.detach().clone()) for p in (a, b)]
    adam = torch.optim.AdamW([dict(params=twin[:1]), dict(params=twin[1:])], lr=0.1, weight_decay=0.0)
    for scale in (100.0, 1e-3, 2.0):
        ga, gb = torch.randn(3, 2) * scale, torch.randn(4)
        a.grad, b.grad = ga.clone(), gb.clone()
        ok, norm = update.step(clip_each=3.0)
        for p, g in zip(twin, (ga, gb), strict=True):
            p.grad = g * min(1, 3.0 / (g.norm().item() + 1e-6))
        adam.step()
        assert ok == 1 and norm.item() == pytest.approx(torch.cat([ga.flatten(), gb]).norm().item(), rel=1e-5)
        for p, q in zip((a, b), twin, strict=True):
            torch.testing.assert_close(p, q)


def test_clipping_all_together():
    (a, b), update = update_for([torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4))])
    a.grad, b.grad = torch.full((3,), 2.0), torch.full((4,), 3.0)
    seen = []
    update.optimizer.step = lambda: seen.append(torch.cat([a.grad, b.grad]).norm().item())
    update.step(clip_all=1.0)
    assert seen == [pytest.approx(1, abs=1e-4)]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(bad):
    (a,), update = update_for([torch.nn.Parameter(torch.ones(3))])
    a.grad = torch.ones(3)
    update.step()
    before, state = a.detach().clone(), {k: v.clone() for k, v in update.optimizer.state[a].items()}
    a.grad = torch.tensor([1.0, bad, 1.0])
    ok, _ = update.step(clip_each=3.0)
    assert ok == 0 and torch.equal(a, before) and update.skipped.tolist() == [1, 1]
    assert all(torch.equal(state[k], v) for k, v in update.optimizer.state[a].items())
    a.grad = torch.ones(3)
    assert update.step()[0] == 1 and not torch.equal(a, before) and update.skipped.tolist() == [1, 0]


def test_ema():
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    dino.ema_update(teacher, student, torch.tensor(0.1))
    for p, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)
    before = [p.clone() for p in teacher.parameters()]
    dino.ema_update(teacher, student, torch.tensor(0.0))
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))


def test_a_bad_batch_leaves_student_teacher_and_center_as_they_were(npz, monkeypatch):
    seen = {}
    real = dino.train_step

    def poisoned(student, teacher, center, update, imgs, draws, args, *rest):
        step = len(seen)
        if step == 3:
            draws[0]["brightness"][:] = float("inf")
        before = [p.clone() for m in (student, teacher) for p in m.parameters()] + [center.clone()]
        out = real(student, teacher, center, update, imgs, draws, args, *rest)
        after = [p for m in (student, teacher) for p in m.parameters()] + [center]
        seen[step] = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return out

    monkeypatch.setattr(dino, "train_step", poisoned)
    dino.main(tiny("--steps", 6, "--log-every", 1))
    assert seen[3] == 0 and all(seen[i] > 10 for i in (2, 4, 5))
    assert log()[-2]["skipped"] == 1 and all(math.isfinite(v) for k, v in losses().items() if k != 4)


def test_a_run_of_bad_batches_ends_with_the_reason(npz, monkeypatch):
    real = dino.augment
    monkeypatch.setattr(dino, "augment", lambda *a: real(*a) * float("nan"))
    with pytest.raises(SystemExit, match="20 non-finite gradients in a row.*step 20.*lr"):
        dino.main(tiny("--log-every", 5))


def test_teacher_starts_equal_and_the_last_layer_is_frozen_in_the_first_epoch(npz, monkeypatch):
    real, prototypes, start = dino.train_step, [], []

    def spy(student, teacher, *rest):
        start.append(all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True)))
        out = real(student, teacher, *rest)
        prototypes.append(student.head.prototypes.detach().clone())
        return out

    monkeypatch.setattr(dino, "train_step", spy)
    dino.main(tiny("--steps", 12))
    assert start[0] and not start[2]
    assert torch.equal(prototypes[0], prototypes[7]) and not torch.equal(prototypes[7], prototypes[9])


@pytest.mark.parametrize("name", dino.ABLATIONS)
def test_ablations_change_one_thing_and_run(npz, name):
    default, changed = dino.get_args(tiny()), dino.get_args(tiny("--ablate", name))
    loss = dino.ablate(changed)
    differ = {k for k in vars(default) if getattr(default, k) != getattr(changed, k)} - {"ablate"}
    expected = {
        "no-centering": {"center_momentum"}, "no-sharpening": {"teacher_temp"}, "no-multicrop": {"local_crops"},
        "no-momentum": {"momentum", "momentum_end"}, "mse": set(), "infonce": set(),
    }[name]  # fmt: skip
    assert differ == expected and (loss is dino.dino_loss) == bool(expected)
    result = dino.main(tiny("--ablate", name, "--steps", 3))
    assert math.isfinite(result["loss"])


def test_without_momentum_the_teacher_is_the_student_to_the_end():
    args = dino.get_args(["--ablate", "no-momentum"])
    dino.ablate(args)
    assert [dino.schedules(step, 100, 10, args)[2] for step in (0, 50, 99)] == [0.0, 0.0, 0.0]
    momentum = [dino.schedules(step, 100, 10, dino.get_args([]))[2] for step in (0, 50, 100)]
    assert momentum == pytest.approx([0.98, 0.99, 1.0])


def test_attention_mask_holds_the_mass_with_as_few_patches_as_can_be():
    maps = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    assert dino.attention_mask(maps).tolist() == [False, True, False, True, False]
    maps = torch.rand(4, 3, 50)
    mask = dino.attention_mask(maps, 0.6)
    share = (maps * mask).sum(-1) / maps.sum(-1)
    smallest = maps.masked_fill(~mask, 9).amin(-1) / maps.sum(-1)
    assert (share >= 0.6).all() and (share - smallest < 0.6).all()


def test_pictures_are_drawn_while_training_and_for_files_of_the_users(npz):
    dino.main(tiny("--steps", 2))
    with Image.open("run/attention.png") as img:  # image and two heads, two rows for each of four images
        assert img.size == (3 * 98 + 2, 8 * 98 + 2)
    Image.radial_gradient("L").resize((90, 50)).save("mine.jpg")
    dino.main(tiny("--attention", "mine.jpg"))
    with Image.open("run/attention-mine.png") as img:
        assert img.size == (3 * 98 + 2, 2 * 98 + 2)


def test_collapse_is_named(npz, capsys):
    dino.main(tiny("--lr", 0, "--teacher-temp", 10, "--student-temp", 10, "--steps", 20))
    assert "COLLAPSED, the same output for all images: uniform" in capsys.readouterr().out
    dino.main(tiny("--teacher-temp", 0.02, "--steps", 20, out="healthy"))
    assert "COLLAPSED" not in capsys.readouterr().out
