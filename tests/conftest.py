import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / "evaluation"), str(ROOT / "tools")]  # scripts, not a package
torch.set_num_threads(1)  # the nets are tiny: threads would only wait for each other
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # TEST_DEVICE=cuda runs the suite there

import dino  # noqa: E402
import hybrid  # noqa: E402
import mae_pcae  # noqa: E402
import siameseim  # noqa: E402
import vit  # noqa: E402

MAIN = dict(dino=dino.main, mae=mae_pcae.main, pcae=mae_pcae.main, siameseim=siameseim.main, hybrid=hybrid.main)
SCRIPT = dict(dino="dino.py", mae="mae_pcae.py", pcae="mae_pcae.py", siameseim="siameseim.py", hybrid="hybrid.py")
NETWORK = dict(dino=dino.DINO, mae=mae_pcae.MAE, pcae=mae_pcae.PCAE, siameseim=siameseim.SiameseIM)
NETWORK["hybrid"] = hybrid.Hybrid
MODULE = dict(dino=dino, mae=mae_pcae, pcae=mae_pcae, siameseim=siameseim, hybrid=hybrid)

SLOW = {m: pytest.param(m, marks=pytest.mark.slow) for m in MAIN if m != "dino"}
dino_fast = pytest.mark.parametrize("method", ["dino", *SLOW.values()])  # for tests that are long, or of vit.py alone


def pytest_collection_modifyitems(config, items):
    """Tests with these marks are left out elsewhere; .ci/run fails where any other test is skipped."""
    newer = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)  # 2.6 wants a driver even for fake tensors
    there = dict(gpu=torch.cuda.is_available(), linux=sys.platform == "linux", fake=newer)
    out = [t for t in items if any(t.get_closest_marker(name) and not there[name] for name in there)]
    config.hook.pytest_deselected(items=out)
    items[:] = [t for t in items if t not in out]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """An empty folder; runs log every step; signal handlers do not outlive a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vit, "LOG_EVERY", 1)
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def pictures(n, side=16, classes=3, seed=0):
    """Noisy images of a few classes: uint8 (n, side, side, 3), labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    base = np.random.default_rng(7).uniform(0, 255, (classes, 4, 4, 3)).repeat(side // 4, 1).repeat(side // 4, 2)
    return (base[labels] + rng.normal(0, 30, (n, side, side, 3))).clip(0, 255).astype(np.uint8), labels


@pytest.fixture
def npz(tmp_path):
    """A small data set as an .npz: 64 training and 24 test images of 16 px, 3 classes."""
    (a, la), (b, lb) = pictures(64), pictures(24, seed=1)
    np.savez(tmp_path / "tiny.npz", train_images=a, train_labels=la, test_images=b, test_labels=lb)
    return "tiny.npz"


@pytest.fixture
def folder(tmp_path):
    """The same as image files: photos/train/<class>/<i>.png and photos/test/..."""
    for split, n, seed in (("train", 64, 0), ("test", 24, 1)):
        for i, (img, label) in enumerate(zip(*pictures(n, seed=seed), strict=True)):
            file = tmp_path / "photos" / split / f"class{label}" / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(img).save(file)
    return "photos"


class Mine:
    """A data set of a user's own: any sequence of images, uint8 (C, height, width)."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((3, 20, 24), i, dtype=torch.uint8)


SMALL = "--decoder-dim 16 --decoder-depth 2 --decoder-heads 2"
SMALL_DINO = "--prototypes 64 --hidden 32 --local-crops 2 --local-size 8"
OWN = {  # keeps a method's own parts small
    "dino": SMALL_DINO,
    "mae": SMALL,
    "pcae": f"{SMALL} --method pcae --momentum 0.9 --stages 0 1",
    "hybrid": f"{SMALL_DINO} --decoder-dim 16 --decoder-heads 2 --decoder-depth 1",
    "siameseim": "--decoder-dim 16 --decoder-heads 2 --decoder-depth 1 --projector-depth 1",
}


def tiny(*more, data="tiny.npz", batch=8, out="run", method="dino"):
    """Options of a run that takes a second: 64 images, 8 steps an epoch."""
    common = f"--data {data} --out {out} --size test --patch 4 --epochs 4 --warmup 1 --batch {batch} --device {DEVICE}"
    return f"{common} {OWN[method]}".split() + [*map(str, more)]


def network(*more, method="dino", channels=3, side=16, size=None):
    """A perturbed network of these options, and its options: (net, args), as main makes them; size: of its images."""
    module = MODULE[method]
    table = module.OPTIONS | (mae_pcae.PCAE_OPTIONS if method == "pcae" else {})
    fixed = {} if module is mae_pcae else dict(method=method)
    args = vit.options("", table, tiny("--precision", "fp32", *more, method=method), **fixed)
    vit.settle(args, table, side)
    vars(args).update(getattr(module, "ABLATIONS", {}).get(vars(args).get("ablate"), {}))
    torch.manual_seed(0)
    net = NETWORK[method](
        vit.vit_kwargs(args, channels) | (dict(img_size=size) if size else {}), args, [0.5] * channels, [0.3] * channels
    )
    for p in net.parameters():  # away from zero biases, unit gains and equal teachers
        p.data += 0.05 * torch.randn_like(p)
    return net, args


def step_once(net, args, imgs, norms=False, step=0, **schedule):
    """train_step on these images, uint8; its statistics."""
    module = MODULE[args.method]
    schedule = dict(lr=1e-3, weight_decay=0.0, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False) | schedule
    parts = net, *vit.adamw(net, args.precision)
    draws = module.sample_step(args, step, imgs.shape[-1])
    more = dict(norms=norms) if args.method == "hybrid" else {}
    return module.train_step(*parts, imgs, draws, SimpleNamespace(**schedule), args, **more)


def log(out="run"):
    """The rows written; a line still without its end is left out, for a reader can meet the writer at a page's edge."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines(True) if line.endswith("\n")]


def losses(out="run"):
    return {r["step"]: r["loss"] for r in log(out) if "loss" in r}


def tensors(x, name=""):
    """Every tensor in a nested checkpoint, by its path."""
    if torch.is_tensor(x):
        return {name: x}
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{name}/{key}").items()}


def checkpoint(out="run"):
    return torch.load(Path(out, "last.pt"), weights_only=True)


def same(a, b):
    """Whether two checkpoints hold the same tensors bit for bit; the names that differ."""
    a, b = tensors(a), tensors(b)
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]


def command(script, *options, processes=1, quick=False, torchrun=("--standalone",)):
    """A script as a user starts it; with torchrun for several processes. quick: as tests/start.py does."""
    launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc-per-node={processes}"] if processes > 1 else []
    launcher += [str(ROOT / "tests/start.py")] if quick else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, options)]


def environment(**more):
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", **more)


def start(script, *options, processes=1, timeout=120):
    argv = command(script, *options, processes=processes)
    return subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=timeout)


def spawn(argv, env=None, **options):
    """A command's process, with all it prints as one text."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(argv, env=env or environment(), **pipes | options)


def training():
    return os.path.exists("run/log.jsonl") and losses()


def wait_for(process, condition=training, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.02)


def encoder(file=None, channels=3, feature="cls", **more):
    """A small ViT of 16 px and its config; also saved to a file, as version 0.1's are in weights/."""
    net = vit.ViT(16, 4, in_chans=channels, **vit.SIZES["test"]).eval()
    config = dict(net.config, mean=[0.5] * channels, std=[0.2] * channels, feature=feature, **more)
    if file:
        torch.save(dict(encoder=net.state_dict(), config=config), file)
    return net, config


def fails(main, argv, capsys):
    """The one line that a script prints when it refuses wrong input with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line and "warning" not in line]
    return err[-1]
