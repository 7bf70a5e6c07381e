"""Each measure against a slow loop from its formula and a closed form; verdicts; the script itself."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import analyze
import dino
import linear
import mae_pcae
import vit
from conftest import ROOT, close, encoder, fails, tiny


@pytest.fixture(scope="module")
def maps():
    return torch.randn(3, 2, 17, 17, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)


def test_golden():
    z = {k: torch.from_numpy(v) for k, v in np.load(ROOT / "tests/golden/analysis.npz").items()}
    grid = (round(z["latents"].shape[2] ** 0.5),) * 2
    distance = lambda maps: analyze.attention_distance(maps.double(), int(z["patch"]), grid).mean(0)
    close(torch.stack([distance(maps) for maps in z["attention"]]), z["attention_distance_px"])
    close(torch.stack([analyze.nmi(maps).mean(0) for maps in z["attention"]]), z["nmi"])
    fourier = [analyze.fourier_log_amplitude(tokens, grid).mean(0) for tokens in z["latents"]]
    close(torch.stack(fourier), z["fourier_log_amplitude"])


def test_closed_forms():
    """Uniform attention on 14 x 14 patches of 16 px looks 116.5 px far and tells nothing; identity, 0 px and all."""
    uniform, identity = torch.ones(1, 1, 197, 197) / 197, torch.eye(197)[None, None]
    assert analyze.attention_distance(uniform, 16, (14, 14)).item() == pytest.approx(116.5, abs=0.05)
    assert analyze.attention_distance(torch.ones(1, 1, 65, 65), 4, (8, 8)).item() == pytest.approx(16.55, abs=0.005)
    assert analyze.attention_distance(identity, 16, (14, 14)).item() == 0
    assert analyze.nmi(uniform).item() == pytest.approx(0, abs=1e-5)
    assert analyze.nmi(identity).item() == pytest.approx(1, abs=1e-5)
    close(analyze.query_similarity(uniform), torch.ones(1, 1))
    close(analyze.query_similarity(identity), torch.zeros(1, 1))
    close(analyze.head_similarity(identity.expand(1, 3, -1, -1)), torch.ones(1))
    rank = lambda x: analyze.effective_rank(analyze.singular_values(x))
    close(rank(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), torch.tensor(2.0))
    close(analyze.singular_values(torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])), torch.tensor([18, 2.0]).sqrt())
    close(rank(torch.linspace(-1, 1, 9)[:, None] * torch.randn(5)), torch.tensor(1.0))  # a line


def test_distance_and_nmi_against_loops(maps):
    distance, nmi = analyze.attention_distance(maps, 4, (2, 8)), analyze.nmi(maps)
    for b in range(3):
        for h in range(2):
            a = maps[b, h, 1:, 1:] / maps[b, h, 1:, 1:].sum(-1, keepdim=True)
            far = [a[q, k] * 4 * math.dist(divmod(q, 8), divmod(k, 8)) for q in range(16) for k in range(16)]
            assert distance[b, h].item() == pytest.approx(float(sum(far)) / 16, rel=1e-5)
            p_k = [sum(a[q, k] for q in range(16)) / 16 for k in range(16)]
            i = sum(a[q, k] / 16 * (a[q, k] / p_k[k]).log() for q in range(16) for k in range(16))
            entropy = -sum(p * p.log() for p in p_k)
            assert nmi[b, h].item() == pytest.approx(float(i / (math.log(16) * entropy) ** 0.5), rel=1e-4)


def test_similarities_against_loops(maps):
    rows = maps[:, :, 1:, 1:]
    cosine = lambda a, b: F.cosine_similarity(a, b, dim=0)
    queries, heads = analyze.query_similarity(maps), analyze.head_similarity(maps)
    for b in range(3):
        pairs = [cosine(rows[b, 1, q], rows[b, 1, r]) for q in range(16) for r in range(16) if q != r]
        close(queries[b, 1], torch.stack(pairs).mean())
        close(heads[b], torch.stack([cosine(rows[b, 0, q], rows[b, 1, q]) for q in range(16)]).mean())


def test_nmi_of_queries_that_look_at_one_key_is_zero_and_a_key_unseen_is_no_nan():
    one = torch.zeros(1, 1, 17, 17)
    one[..., 3] = 1
    assert analyze.nmi(one).item() == pytest.approx(0, abs=1e-5)
    unseen = torch.rand(1, 1, 17, 17)
    unseen[..., 5] = 0
    assert 0 < analyze.nmi(unseen / unseen.sum(-1, keepdim=True)).item() < 1


def test_fourier_against_a_loop():
    x = torch.randn(2, 16, 3)
    ours = analyze.fourier_log_amplitude(x, (4, 4))
    means = []
    for i in (0, 1):  # frequency (i, i), counted from DC downwards as fftshift does
        wave = torch.exp(torch.tensor([[2j * math.pi * i * (y + u) / 4 for u in range(4)] for y in range(4)]))
        logs = [[(wave * x[b, :, c].view(4, 4)).sum().abs().add(1e-6).log() for c in range(3)] for b in range(2)]
        means.append(torch.tensor(logs).mean(1))
    close(ours[:, 1], means[1] - means[0])
    assert torch.equal(ours[:, 0], torch.zeros(2)) and ours.shape == (2, 2)


def test_white_noise_and_an_offset():
    """White tokens: +.33 on 14 x 14 (DC of real noise has one degree of freedom, others two); an offset lowers it."""
    x = torch.randn(50, 196, 64, generator=torch.Generator().manual_seed(0))
    assert analyze.fourier_log_amplitude(x, (14, 14))[:, -1].mean().item() == pytest.approx(0.33, abs=0.03)
    assert analyze.fourier_log_amplitude(x + 2, (14, 14))[:, -1].mean() < -2.5


@pytest.mark.parametrize("side", [14, 32, 224])
def test_noise_stays_in_its_band_and_the_bands_tile_the_plane(side):
    """Whatever the band, the noise has a variance of 1; no frequency is lost, none is in two bands."""
    f, count = torch.fft.fftfreq(side).abs() * 2, 0
    radius = torch.maximum(f[:, None], f[None])
    for band in torch.arange(10) / 10:
        noise = analyze.band_noise((2, 3, side, side), band.item(), torch.Generator().manual_seed(0))
        there = torch.fft.fft2(noise)[0, 0].abs() > 1e-3 * side
        assert ((radius[there] >= band - 1e-6) & (radius[there] <= band + 0.1 + 1e-5)).all()
        power = there.any().float().expand(2)  # a small image has no frequency in some bands
        close(noise.square().mean((1, 2, 3)), power)
        count += there.int()
    assert bool((count == 1).all())


def test_shape_or_texture_against_a_loop():
    x, g = torch.randn(30, 4), torch.Generator().manual_seed(0)
    shapes, textures = torch.randint(0, 3, (30,), generator=g), torch.randint(0, 2, (30,), generator=g)
    ours = analyze.shape_or_texture(x, shapes, textures, k=5)
    for i in range(30):
        near = lambda j, i=i: -float(F.cosine_similarity(x[i], x[j], dim=0))
        order = sorted((j for j in range(30) if j != i), key=near)
        kind = lambda j, i=i: (bool(shapes[i] == shapes[j]), bool(textures[i] == textures[j]))
        rates = []
        for wanted in ((True, False), (False, True)):
            all_of = sum(kind(j) == wanted for j in range(30) if j != i)
            rates.append(sum(kind(j) == wanted for j in order[:5]) / max(1, all_of))
        expected = rates[0] / sum(rates) if sum(rates) else float("nan")
        assert ours[i].item() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    shapes, textures = torch.arange(300) % 3, torch.arange(300) // 3 % 2
    assert analyze.shape_or_texture(F.one_hot(shapes) + 0.01 * torch.randn(300, 3), shapes, textures).nanmean() > 0.6
    assert analyze.shape_or_texture(F.one_hot(textures) + 0.01 * torch.randn(300, 2), shapes, textures).nanmean() < 0.4


def test_verdicts_need_two_standard_errors():
    groups = ([(3, 0.1)], [(1, 0.1)]), ([(1, 0.1)], [(3, 0.1)]), ([(3, 1.0)], [(1, 1.0)]), ([], [(1, 0.1)])
    found = [analyze.verdict(1, "a > b", a, b) for a, b in groups]
    assert [analyze.verdict(1, "a < b", a, b)["verdict"] for a, b in groups[:2]] == ["fails", "holds"]
    assert [f["verdict"] for f in found] == ["holds", "fails", "undecided", "not measured"]
    assert found[0]["margin"] == 2 and found[0]["error"] == pytest.approx(0.02**0.5)
    margin, error = analyze.compare([(1, 0.3), (2, 0.3), (3, 0.3)], [(0, 0.4)])
    assert margin == 2 and error == pytest.approx((0.09 + 1 / 3 + 0.16) ** 0.5)  # variance over three seeds is 1


def test_the_script(npz, capsys):
    dino.main(tiny("--steps", 2, out="d"))
    mae_pcae.main(tiny("--steps", 2, out="m", method="mae"))
    capsys.readouterr()
    for out in ("d", "m"):  # the real lines of linear.py, with other numbers
        row = linear.main([f"{out}/last.pt", "--device", "cpu", "--epochs", "1"])
        row["results"] |= dict(linear=dict(d=80.0, m=50.0)[out], test=100)
        vit.Path(dict(d="a", m="b")[out] + ".json").write_text("text\n" + json.dumps(row) + "\n")
    files = ["--results", "a.json", "b.json"]
    result = analyze.main(["d/last.pt", "m/last.pt", "--quick", "--out", "an", "--device", "cpu", *files])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["task"] == "analyze" and last["results"]["images"] == 24
    assert "8: holds" in last["results"]["verdicts"] and "9: not measured" in last["results"]["verdicts"]
    result = result["results"]
    kinds = {name: m["kind"] for name, m in result["models"].items()}
    assert kinds == {"d": "cl", "m": "mim", "untrained": "untrained"}
    found = result["models"]["d"]["found"]
    assert found["images"]["distance"].keys() == {"1", "2"} and len(found["linear"]) == 3
    assert {c["claim"] for c in result["claims"]} == set(range(1, 11))
    assert json.loads(vit.Path("an/analysis.json").read_text())["models"].keys() == kinds.keys()
    with Image.open("an/analysis.png") as img:
        assert img.width == 1400
    with Image.open("an/queries.png") as img:  # an image and three encoders; two queries of each of three images
        assert img.size == (640, 960)


def measure(net, config, images, batch):
    return analyze.measure_images(net, images, config, SimpleNamespace(batch=batch, workers=0), torch.device("cpu"))


def test_neither_batch_nor_order_changes_a_measure(npz):
    (net, config), images, order = encoder(), vit.open_images(npz)[1], torch.randperm(24).tolist()
    whole, spectrum = measure(net, config, images, 24)
    parts, other = measure(net, config, images.pick(order), 5)
    for name in whole:
        for depth in whole[name]:
            close(whole[name][depth][order], parts[name][depth])
    close(torch.tensor(spectrum), torch.tensor(other))


def test_clustering_is_less_the_mean_token_of_all_images(npz):
    (net, config), images = encoder(), vit.open_images(npz)[1]
    found, _ = measure(net, config, images, 7)
    with torch.no_grad():
        x = net.embed(vit.prepare(images.items, config))[:, 1:]
    x = F.normalize(x - x.mean((0, 1)), dim=-1)
    for i in range(len(x)):
        pairs = [x[i, a] @ x[i, b] for a in range(16) for b in range(16) if a != b]
        assert found["clustered"][0][i].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)


def test_features_of_each_depth_and_of_a_feature_twice_as_wide(npz):
    images, args = vit.open_images(npz)[1], SimpleNamespace(batch=24, workers=0)
    for feature in ("mean", "both"):
        net, config = encoder(feature=feature)
        found = analyze.features_by_depth(net, images, config, args, torch.device("cpu"))
        x = vit.prepare(torch.stack([images[i] for i in range(24)]), config)
        for ours, tokens in zip(found, net.layers(x), strict=False):
            close(ours, tokens[:, 1:].mean(dim=1))
        close(found[-1], net.encode(x, feature))


def test_cue_conflict_layout(npz, tmp_path):
    dino.main(tiny("--steps", 1, out="d"))
    for i, shape in enumerate(("cat", "dog", "car")):
        for j, texture in enumerate(("bear", "clock")):
            file = tmp_path / "cue" / shape / f"{shape}{i}-{texture}{j}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), 40 * i + 60 * j, dtype=np.uint8)).save(file)
    result = analyze.main(["d/last.pt", "--quick", "--out", "an", "--cue-conflict", "cue", "--device", "cpu"])
    assert len(result["results"]["models"]["d"]["found"]["shape"]) == 3


def test_a_result_that_cannot_be_read_is_refused_before_measuring(npz, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "measure_encoder", lambda *_: pytest.fail("measured first"))
    encoder("a.pt", data=npz)
    line = fails(analyze.main, ["a.pt", "--results", "nowhere.json"], capsys)
    assert "nowhere.json is not a readable result" in line
