"""Equal to the authors' own code: numbers computed by running it, on networks whose every parameter was perturbed."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dino
import vit

GOLDEN = Path(__file__).with_name("golden")


def golden(name):
    """The arrays of a golden file as tensors, and its weights (those under w/) by the authors' names."""
    arrays = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    return arrays, {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}


def test_vit():
    z, weights = golden("vit")
    size, patch, dim, depth, heads = z["config"].tolist()
    net = vit.ViT(size, patch, 3, dim, depth, heads).eval()
    net.load_state_dict(weights)  # strict: the authors' names are ours
    with torch.no_grad():
        torch.testing.assert_close(net(z["x"])[:, 0], z["cls"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net.cls(z["x"]), z["cls"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(net.layers(z["x"])), z["layers"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net.attention(z["x"]), z["last_attention"], rtol=1e-5, atol=1e-5)


def test_dino_head():
    z, weights = golden("dino_head")
    weights["prototypes"], weights["length"] = weights.pop("last_layer.weight_v"), weights.pop("last_layer.weight_g")
    head = dino.DINOHead(z["z"].shape[1], 64, hidden=64, bottleneck=32)
    head.load_state_dict(weights)
    torch.testing.assert_close(head(z["z"]), z["logits"], rtol=1e-5, atol=1e-5)


def test_dino_loss_and_center_over_five_steps():
    z, _ = golden("dino_loss")
    center, views = torch.zeros(z["teacher"].shape[-1]), int(z["n_crops"])
    for i, temp in enumerate(z["teacher_temp"].tolist()):
        student = z["student"][i].clone().requires_grad_()
        teacher = z["teacher"][i].unflatten(0, (2, -1))
        loss, _, _ = dino.dino_loss(student.unflatten(0, (views, -1)), teacher, center, float(z["student_temp"]), temp)
        loss.backward()
        torch.testing.assert_close(loss, z["loss"][i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(student.grad, z["student_grad"][i], rtol=1e-4, atol=1e-6)
        center.lerp_(teacher.mean((0, 1)), 1 - float(z["center_momentum"]))
        torch.testing.assert_close(center, z["center_after"][i, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lr", "wd", "momentum"])
def test_schedules(name):
    z, _ = golden("schedules")
    base, final, epochs, per_epoch, warmup = z[f"{name}_args"].tolist()
    total = int(epochs * per_epoch)
    ours = [dino.cosine(i, total, base, final, warmup * per_epoch) for i in range(total)]
    np.testing.assert_allclose(ours, z[name].numpy(), rtol=1e-5, atol=1e-12)


def test_knn():
    z, _ = golden("knn")
    ks = (1, 5, 20, 100)
    ours = vit.knn(z["train"], z["train_labels"], z["test"], z["test_labels"], ks, float(z["temperature"]))
    for k in ks:
        np.testing.assert_allclose(ours[k], z[f"top_k{k}"].numpy(), atol=1e-3)
