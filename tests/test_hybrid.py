"""The hybrid: its ends are the two methods, its gradient the weighted sum of theirs; contracts of a run."""

import pytest
import torch

import dino
import hybrid
import vit
from conftest import close, log, network, step_once, tiny


def step(weight, method="hybrid", norms=False):
    """The statistics of one step of the hybrid, or of the part of it that is one of the two methods."""
    net, args = network("--weight", weight, "--drop-path", 0, "--clip", 0, method="hybrid")
    imgs = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    part = dict(hybrid=net, mae=net.mae, dino=dino.DINO(vit.vit_kwargs(args, 3), args, [0.5] * 3, [0.3] * 3))[method]
    if method == "dino":
        part.student, part.teacher = net.student, net.teacher
    args.method, args.ablate = method, None
    return step_once(part, args, imgs, norms, step=2**31 if method == "mae" else 0)  # the hybrid's seeds


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_its_ends_are_mae_and_dino(npz, weight):
    """The same losses, to 1e-6, as those two scripts' own train_step finds on the same inputs."""
    ours, theirs = step(weight, norms=True), step(weight, "dino" if weight else "mae")
    close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    close(ours[0], ours[2 if weight else 1], rtol=1e-6, atol=1e-6)
    close(ours[4], theirs[3], atol=1e-6)  # the gradient's norm
    assert ours[5 + int(weight == 0)] == 0 and ours[5 + int(weight == 1)] > 0  # the other part does not pull


def test_the_loss_and_both_pulls_are_weighted(npz):
    half, ends = step(0.3, norms=True), (step(0.0, norms=True), step(1.0, norms=True))
    close(half[0], 0.7 * ends[0][0] + 0.3 * ends[1][0], atol=1e-6)
    close(half[5], 0.7 * ends[0][5], rtol=1e-4, atol=1e-6)
    close(half[6], 0.3 * ends[1][6], rtol=1e-4, atol=1e-6)
    assert torch.equal(step(0.3)[:5], half[:5])


@pytest.mark.parametrize("method", ["dino", "hybrid"])
def test_the_centre_follows_the_teacher_s_mean_output(method):
    net, args = network("--center-momentum", 0.8, method=method)
    seen = []
    net.teacher.register_forward_hook(lambda module, views, out: seen.append(out))
    step_once(net, args, torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8))
    close(net.center, 0.2 * seen[0].mean(dim=0))  # it began at zero


def test_pulls_in_fp16_are_those_of_fp32():
    """The scaler multiplies every gradient; the logged norms are divided by it again."""
    imgs = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    options = ("--weight", 0.3, "--drop-path", 0, "--precision")
    found = [step_once(*network(*options, p, method="hybrid"), imgs, norms=True)[5:] for p in ("fp32", "fp16")]
    close(*found, rtol=0.05, atol=0)


def test_a_run_and_its_log(npz):
    result = hybrid.main(tiny("--weight", 0.2, method="hybrid"))
    assert result["knn"] > 30 and result["step"] == 32
    row = next(r for r in log() if r.get("step") == 8)
    assert row["loss"] == pytest.approx(0.8 * row["mim"] + 0.2 * row["cl"], rel=1e-4)
    first = next(r for r in log() if r.get("step") == 1)
    assert first["grad_mim"] > 0 and first["grad_cl"] > 0 and "grad_cl" not in row
