"""k-NN: equal to a brute-force loop, any number of images and classes; the script itself."""

import json
import math

import numpy as np
import pytest
import torch

import dino
import eval_knn
import vit
from conftest import fails, tiny


def brute_force(train, labels, test, wanted, k, temperature=0.07):
    right = 0
    for x, y in zip(test, wanted, strict=True):
        cosine = lambda t, x=x: x @ t / np.linalg.norm(x) / np.linalg.norm(t)
        similar = [(cosine(t), label) for t, label in zip(train, labels, strict=True)]
        votes = {}
        for s, label in sorted(similar, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(s / temperature)
        right += max(votes, key=votes.get) == y
    return 100 * right / len(test)


@pytest.mark.parametrize("m,n,classes", [(50, 7, 3), (30, 40, 2), (5, 1, 5), (200, 33, 7)])
def test_equal_to_a_loop(m, n, classes):
    rng = np.random.default_rng(m)
    labels, wanted = rng.integers(0, classes, m), rng.integers(0, classes, n)
    centers = rng.standard_normal((classes, 8))
    train, test = (centers[t] + rng.standard_normal((len(t), 8)) for t in (labels, wanted))
    args = [torch.tensor(t) for t in (train, labels, test, wanted)]
    ours = vit.knn(*args, ks=(1, 5, 20, 200), chunk_bytes=1)  # a query at a time, and k above the number of images
    for k in (1, 5, 20, 200):
        assert ours[k][0] == pytest.approx(brute_force(train, labels, test, wanted, k))
        assert ours[k][1] >= ours[k][0]
    assert ours == vit.knn(*args, ks=(1, 5, 20, 200))


def test_a_low_temperature_is_the_nearest_alone():
    """Votes do not overflow: with features all alike, exp(1 / .001) is inf."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 8, generator=g) * 0.05 + 1, torch.arange(80) % 4
    test, wanted = x + 0.001 * torch.randn(80, 8, generator=g), y
    assert vit.knn(x, y, test, wanted, (1, 50), 1e-6)[50][0] == vit.knn(x, y, test, wanted, (1,), 0.07)[1][0] > 90


def test_the_script(npz, capsys):
    dino.main(tiny("--steps", 2))
    capsys.readouterr()
    result = eval_knn.main(["run/last.pt", "--hits", "f.npz", "--k", "1", "20", "200", "--json", "k.json"])["results"]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*result["cls"]] == [1, 20, 64]  # there are no 200
    assert last.keys() == {"task", "checkpoint", "method", "data", "args", "results"} and last["task"] == "knn"
    assert last == json.loads(vit.Path("k.json").read_text()) and last["args"]["temperature"] == 0.07
    for row in (names := ("pixels", "untrained", "cls", "mean")):
        assert {str(k): v for k, v in result[row].items()} == last["results"][row]
    alone = eval_knn.main(["run/last.pt", "--k", "1", "20", "200", "--no-baselines", "--limit", "20"])["results"]
    assert "pixels" not in alone and alone["train"] == alone["test"] == 20
    with np.load("f.npz") as z:
        assert {k: round(100 * z[k].mean(), 3) for k in names} == {k: result[k][20] for k in names}
        assert z["best"].tolist() == z["cls"].tolist() and z["best"].shape == (24,)
    found = eval_knn.main(["run/last.pt", "--k", "20", "--against", "f.npz"])["results"]["against"]
    assert found == dict(file="f.npz", right_alone=0, other_right_alone=0, p=1.0)
    for other in (["--limit", "20"], ["--k", "1"]):
        line = fails(eval_knn.main, ["run/last.pt", "--against", "f.npz", *other], capsys)
        assert "f.npz is of other test images, or of k = 20" in line


@pytest.mark.parametrize("alone", [(0, 0), (9, 2), (2, 9), (40, 31)])
def test_mcnemar(alone):
    """Against a coin that is thrown for each image that one of the two alone gets right."""
    a = np.array([1] * alone[0] + [0] * alone[1] + [1, 0], bool)
    b = np.array([0] * alone[0] + [1] * alone[1] + [1, 0], bool)
    n, farther = sum(alone), abs(alone[0] - alone[1])
    chance = sum(math.comb(n, i) for i in range(n + 1) if abs(n - 2 * i) >= farther) / 2**n
    assert eval_knn.mcnemar(a, b) == (*alone, pytest.approx(chance))
