"""The hybrid: its ends are the two methods, its gradient the weighted sum of theirs; contracts of a run."""

import functools

import pytest
import torch
from conftest import checkpoint, fails, log, same, start, tiny
from PIL import Image

import dino
import hybrid
import mae_pcae
from vit import ViT

options = functools.partial(tiny, method="hybrid")


def parts(weight):
    """Everything a step needs, perturbed, on eight images."""
    args = hybrid.get_args(options("--weight", weight, "--precision", "fp32", "--drop-path", 0))
    torch.manual_seed(0)
    shape = dict(dim=32, depth=2, heads=2, img_size=args.img_size, patch=4, in_chans=3)
    mae = mae_pcae.MAE(shape, args)
    nets = torch.nn.ModuleDict(dict(mae=mae, student=dino.DINO(mae.vit, dino.DINOHead(32, 64, 32))))
    teacher = dino.DINO(ViT(**shape, pos="sincos"), dino.DINOHead(32, 64, 32)).requires_grad_(False)
    for p in [*nets.parameters(), *teacher.parameters()]:
        p.data += 0.05 * torch.randn_like(p)
    imgs = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return args, nets, teacher, imgs, torch.zeros(64), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.3)


def run_step(weight, norms=True):
    args, nets, teacher, imgs, center, mean, std = parts(weight)
    update = dino.Update([nets], torch.device("cpu"), "fp32")
    draws = hybrid.draw_all(args, 0)
    return hybrid.train_step(nets, teacher, center, update, imgs, draws, args, 0.04, 0.99, mean, std, norms)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_its_ends_are_mae_and_dino(npz, weight):
    """The same losses, to 1e-6, as those two scripts' own train_step finds on the same inputs."""
    args, nets, teacher, imgs, center, mean, std = parts(weight)
    d_mim, *d_cl = hybrid.draw_all(args, 0)
    if weight == 0:
        update = mae_pcae.Update([nets["mae"]], torch.device("cpu"), "fp32")
        expected = mae_pcae.train_step(nets["mae"], update, imgs, d_mim, args, 0.99, mean, std)[0]
    else:
        update = dino.Update([nets["student"]], torch.device("cpu"), "fp32")
        rest = (args, 0.04, 0.99, mean, std)
        expected = dino.train_step(nets["student"], teacher, center, update, imgs, d_cl, *rest)[0]
    ours = run_step(weight)
    torch.testing.assert_close(ours[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[0], ours[2 if weight else 1], rtol=1e-6, atol=1e-6)
    assert (ours[5 + int(weight == 0)] == 0) and ours[5 + int(weight == 1)] > 0  # the other part does not pull


def test_the_loss_and_both_pulls_are_weighted(npz):
    half, ends = run_step(0.3), (run_step(0.0), run_step(1.0))
    torch.testing.assert_close(half[0], 0.7 * ends[0][0] + 0.3 * ends[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(half[5], 0.7 * ends[0][5], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(half[6], 0.3 * ends[1][6], rtol=1e-4, atol=1e-6)
    assert torch.equal(run_step(0.3, norms=False)[:5], half[:5])


def test_a_run_its_log_and_its_pictures(npz):
    result = hybrid.main(options("--log-every", 4))
    assert result["knn"] > 30 and result["step"] == 32
    row = next(r for r in log() if r.get("step") == 8)
    assert row["loss"] == pytest.approx(0.8 * row["mim"] + 0.2 * row["cl"], rel=1e-4)
    assert row["grad_mim"] > 0 and row["grad_cl"] > 0
    for name in ("attention", "reconstruction", "curve"):
        with Image.open(f"run/{name}.png") as img:
            assert img.width > 100


def test_resume_is_bit_for_bit(npz):
    hybrid.main(options("--steps", 12, out="straight"))
    hybrid.main(options("--steps", 5))
    hybrid.main(options("--steps", 12))
    assert same(checkpoint("straight"), checkpoint()) == []


@pytest.mark.slow
def test_two_processes_are_one(npz):
    exact = ["--precision", "fp32", "--drop-path", 0, "--log-every", 1, "--steps", 12]
    hybrid.main(options(*exact, batch=16, out="one"))
    done = start("hybrid.py", *options(*exact, "--accumulate", 2, batch=16, out="two"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = ([r["loss"] for r in log(out) if "loss" in r] for out in ("one", "two"))
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    "more,message",
    [
        (["--mask-ratio", "0"], "leaves all or none of"),
        (["--weight", "2"], "--weight 2.0 is not between 0 and 1"),
        (["--data", "nowhere"], "--data nowhere"),
        (["--patch", "5", "--img-size", "16"], "not a multiple of --patch 5"),
    ],
)
def test_wrong_input(npz, capsys, more, message):
    assert message in fails(hybrid.main, options(*more), capsys)
