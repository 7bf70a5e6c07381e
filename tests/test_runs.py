"""The contracts of a training run: resume, processes, micro-batches, signals, wrong input."""

import contextlib
import functools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import (
    DEVICE,
    MAIN,
    MODULE,
    ROOT,
    SCRIPT,
    Mine,
    checkpoint,
    close,
    command,
    dino_fast,
    fails,
    log,
    losses,
)

# isort: split
from PIL import Image

import dino
import mae_pcae
import vit
from conftest import encoder, environment, network, pictures, same, spawn, start, tensors, tiny, wait_for

everywhere = pytest.mark.parametrize("method", MAIN)
EXACT = ["--precision", "fp32", "--drop-path", 0]


@everywhere
def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(method, npz):
    main = MAIN[method]
    main(tiny("--steps", 20, "--drop-path", 0.1, out="straight", method=method))
    main(tiny("--steps", 10, "--drop-path", 0.1, method=method))
    with open("run/log.jsonl", "a") as f:
        f.write('{"step": 15, "loss": 9}\n')  # of a run that died after its last save
    main(tiny("--steps", 20, "--drop-path", 0.1, method=method))
    assert same(checkpoint("straight"), checkpoint()) == []
    assert [r["step"] for r in log() if "loss" in r] == list(range(1, 21))


FOLLOWS = dict(dino=("/net/teacher.", "/net/student."), pcae=("/net/teacher.", "/net/vit."))
FOLLOWS |= dict(siameseim=("/net/target.", "/net/online."), hybrid=FOLLOWS["dino"])


@pytest.mark.parametrize("method", FOLLOWS)
def test_the_teacher_begins_as_the_student_and_follows_it_by_momentum(method, npz):
    """By the loop itself: equal while nothing learns; then t = m t + (1 - m) s, with m of that step."""
    teacher, student = FOLLOWS[method]

    def run(out, *more):
        MAIN[method](tiny(*more, "--momentum", 0.8, method=method, out=out))
        found = tensors(checkpoint(out))
        return [(v, found[student + k[len(teacher) :]]) for k, v in found.items() if k.startswith(teacher)]

    still = run("still", "--lr", 0, "--steps", 2)
    assert len(still) > 20 and all(torch.allclose(t, s, rtol=0, atol=1e-5) for t, s in still)  # a last lr of 1e-6
    before, after = (run("run", "--warmup", 0, "--steps", steps) for steps in (1, 2))
    m = vit.cosine(1, 32, 0.8, 1.0)
    for (t, _), (moved, s) in zip(before, after, strict=True):
        close(moved, m * t + (1 - m) * s, rtol=0, atol=1e-6)
    assert sum(not torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True)) > 20


@pytest.mark.parametrize("method", ["dino", "mae", "siameseim", "hybrid"])
def test_gradients_are_clipped_as_the_paper_s_authors_do(method, npz, monkeypatch):
    """DINO: each parameter's norm. MAE and SiameseIM: that of all together."""
    norms = []

    def step(adam):
        norms.extend(p.grad.norm().item() for g in adam.param_groups for p in g["params"] if p.grad is not None)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    MAIN[method](tiny("--steps", 1, "--clip", 1e-3, method=method))
    largest, total = max(norms), math.hypot(*norms)
    assert largest <= 1.01e-3 and (0.9e-3 < total <= 1.01e-3 if method in ("mae", "siameseim") else total > 3e-3)


@dino_fast
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_restarts_change_nothing(method, folder, monkeypatch, workers):
    main = MAIN[method]
    options = functools.partial(tiny, "--workers", workers, data="photos", method=method)
    main(options("--steps", 10, out="memory"))
    monkeypatch.setattr(vit, "IN_MEMORY", 0)  # even this small folder is streamed
    main(options("--steps", 10, out="straight"))
    main(options("--steps", 5))
    main(options("--steps", 10))
    assert same(checkpoint("straight"), checkpoint()) == []
    assert same(checkpoint("memory")["net"], checkpoint()["net"]) == []  # nor does it matter where the images are


def nearly(a, b, name):
    """Two runs agree: losses, the encoder's output and weights to 1e-5.

    After 20 steps of AdamW rounding moves weights by far less than that. The key part of the qkv bias is left out: its
    true gradient is zero, and AdamW turns rounding into whole steps.
    """
    seen = sorted(losses(a).keys() & losses(b).keys())
    assert len(seen) >= 3
    close(*(torch.tensor([losses(x)[s] for s in seen]) for x in (a, b)))
    nets = [vit.load_encoder(f"{out}/last.pt")[0] for out in (a, b)]
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(nets[0](x), nets[1](x))
    a, b = tensors(checkpoint(a)["net"]), tensors(checkpoint(b)["net"])
    for k in a:
        if k.endswith("qkv.bias"):
            d = len(a[k]) // 3
            a[k][d : 2 * d] = b[k][d : 2 * d] = 0
        close(a[k], b[k], msg=lambda m, k=k: f"{name} {k}: {m}")


@everywhere
def test_accumulation_is_the_whole_batch(method, npz):
    exact = [*EXACT, "--epochs", 5, *(["--norm", "layer"] if method == "siameseim" else [])]  # BatchNorm: of a forward
    MAIN[method](tiny(*exact, batch=16, out="whole", method=method))
    MAIN[method](tiny(*exact, "--accumulate", 4, batch=16, out="parts", method=method))
    assert len(losses("whole")) == 20
    nearly("whole", "parts", method)


@pytest.mark.parametrize(
    "method,processes",
    [("dino", 2), ("mae", 2), ("siameseim", 2)]
    + [pytest.param(*x, marks=pytest.mark.slow) for x in (("pcae", 2), ("hybrid", 2), *((m, 3) for m in MAIN))],
)
def test_several_processes_are_one(method, processes, npz):
    """With micro-batches, and with prototypes that are frozen at first."""
    exact = [*EXACT, "--epochs", 5, *(["--freeze-last-layer", 1] if method in ("dino", "hybrid") else [])]
    MAIN[method](tiny(*exact, batch=12, out="one", method=method))
    parts = 1 if method == "siameseim" else 2  # its BatchNorm is over all processes, not over micro-batches
    options = tiny(*exact, "--accumulate", parts, batch=12, out="several", method=method)
    done = start(SCRIPT[method], *options, processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{processes} processes -> several" in done.stdout and "Warning" not in done.stderr, done.stderr
    nearly("one", "several", method)


@pytest.mark.slow
@everywhere
def test_compile_in_two_processes(method, npz):
    exact = [*EXACT, "--steps", 2]
    MAIN[method](tiny(*exact, out="eager", method=method))
    done = start(SCRIPT[method], *tiny(*exact, "--compile", out="fused", method=method), processes=2, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [*losses("fused").values()] == pytest.approx([*losses("eager").values()], rel=1e-3)
    assert tensors(checkpoint("fused")["net"]).keys() == tensors(checkpoint("eager")["net"]).keys()


@dino_fast
def test_as_a_user_starts_it(method, npz):
    done = start(SCRIPT[method], *tiny("--steps", 3, method=method))
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r'"knn": [\d.]+', done.stdout.splitlines()[-1])
    again = start(SCRIPT[method], *tiny("--steps", 3, method=method))  # a finished run prints its result
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


@dino_fast
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(method, npz, number):
    process = spawn(command(SCRIPT[method], *tiny("--epochs", 500, method=method)))
    wait_for(process)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "run the same command again to resume" in text
    assert "saving after this step; Ctrl-C again to stop without saving" in text and "loading PyTorch" in text
    step = checkpoint()["step"]
    assert step >= 1 and f"stopped at step {step} " in text and max(losses()) == step


@dino_fast
def test_two_runs_in_one_folder_corrupt_nothing_and_a_killed_one_does_not_block_the_next(method, npz):
    """No file is locked: each process writes to a temporary file of its own, then moves it."""
    both = [spawn(command(SCRIPT[method], *tiny("--epochs", 500, method=method), quick=True)) for _ in range(2)]
    wait_for(both[0], lambda: os.path.exists("run/last.pt"))
    for process in both:
        process.kill()
        process.communicate()
    assert start(SCRIPT[method], *tiny("--epochs", 500, "--steps", 20, method=method)).returncode == 0
    assert [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "given",
    ["WORLD_SIZE=2", "WORLD_SIZE=2 RANK=0", "WORLD_SIZE=two RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"]
    + ["WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=abc"],
)
def test_several_processes_need_all_that_torchrun_sets(npz, capsys, monkeypatch, given):
    for pair in given.split():
        monkeypatch.setenv(*pair.split("="))
    assert "several processes need all that torchrun sets" in fails(dino.main, tiny("--steps", 1), capsys)


def test_an_empty_world_size_and_a_thread_are_one_process(npz, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    with ThreadPoolExecutor(1) as pool:  # no signal handler may be set there
        assert pool.submit(dino.main, tiny("--steps", 2)).result()["step"] == 2


@pytest.mark.parametrize("weights,name", [("init", "knn_start"), (None, "knn_untrained")])
def test_the_first_knn_is_called_what_it_is(npz, weights, name):
    encoder("init", data=npz)
    dino.main(tiny("--steps", 1, *(["--init", weights] if weights else [])))
    assert log()[1].keys() == {"knn_pixels", name}


def test_an_ascii_console_can_show_all(npz):
    env = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    for options in (["--help"], tiny("--steps", 1, "--out", "r\u00fcn")):
        done = subprocess.run(command("dino.py", *options), env=env, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]


@dino_fast
def test_a_log_without_a_checkpoint_is_of_a_dead_run(method, npz):
    os.mkdir("run")
    Path("run/log.jsonl").write_text('{"args": {}}\n{"step": 7, "seconds": 1e9}\n{"st')
    MAIN[method](tiny("--steps", 2, method=method))
    assert log()[0]["args"]["batch"] == 8 and max(r.get("seconds", 0) for r in log()) < 1e6


@everywhere
def test_the_log_has_what_the_design_promises(method, npz, monkeypatch):
    here = os.getcwd()
    monkeypatch.undo()  # logging as users have it
    os.chdir(here)
    monkeypatch.setattr(vit, "SAVE_EVERY", 0)
    MAIN[method](tiny(method=method))
    rows = log()
    assert rows[0].keys() == {"args", "images", "script"} and rows[0]["args"]["batch"] == 8 and rows[0]["images"] == 64
    assert rows[1].keys() == {"knn_pixels", "knn_untrained"}
    wanted = {"step", "epoch", "loss", "lr", "images_per_s", "skipped", "seconds"}
    assert all(wanted <= r.keys() for r in rows[1:] if "loss" in r)
    assert [r["step"] for r in rows if "loss" in r] == [1, 10, 20, 30, 32]
    assert [r["epoch"] for r in rows if "knn" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("method,by,epochs,more", [("mae", 0.02, 30, ""), ("siameseim", 0.1, 20, "--neg-weight 0.24")])
def test_the_loss_falls(method, by, epochs, more, npz):
    MAIN[method](tiny("--lr", 0.05, "--epochs", epochs, *more.split(), method=method))
    first, *_, last = losses().values()
    assert last < first - by and math.isfinite(last)


@everywhere
def test_same_seed_same_run_and_another_seed_another(method, npz):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        MAIN[method](tiny("--steps", 5, "--seed", seed, out=out, method=method))
    assert losses("a") == losses("b") != losses("c")


@everywhere
def test_init_from_a_run_and_from_an_encoder(method, npz):
    MAIN[method](tiny("--steps", 8, out="first", method=method))
    first = checkpoint("first")
    torch.save({k: first[k] for k in ("encoder", "config")}, "bare.pt")  # as the files in weights/ are
    for i, file in enumerate(("first/last.pt", "bare.pt")):
        MAIN[method](tiny("--steps", 1, "--lr", 0, "--init", file, out=f"again{i}", method=method))
        assert same(first["encoder"], checkpoint(f"again{i}")["encoder"]) == []  # a first step has a rate of 0
    os.rename("bare.pt", "moved.pt")  # a run that has begun does not need it any more
    assert MAIN[method](tiny("--steps", 2, "--lr", 0, "--init", "bare.pt", out="again1", method=method))["step"] == 2
    os.rename("moved.pt", "bare.pt")
    MAIN[method](tiny("--steps", 1, "--img-size", 24, "--init", "bare.pt", out="larger", method=method))
    assert checkpoint("larger")["encoder"]["pos_embed"].shape[1] == 37  # interpolated


@pytest.mark.slow
@everywhere
def test_compile_on_a_cpu(method, npz):
    exact = ["--steps", 2, "--precision", "fp32"]
    MAIN[method](tiny(*exact, out="eager", method=method))
    MAIN[method](tiny(*exact, "--compile", out="fused", method=method))
    assert [*losses("fused").values()] == pytest.approx([*losses("eager").values()], rel=1e-3)
    assert tensors(checkpoint("fused")["net"]).keys() == tensors(checkpoint("eager")["net"]).keys()  # no _orig_mod.


@everywhere
def test_fp16_with_its_scaler(method, npz):
    MAIN[method](tiny("--steps", 3, "--precision", "fp16", method=method))
    assert checkpoint()["scaler"]["scale"] > 0


def test_saves_are_a_minute_apart(monkeypatch):
    monkeypatch.undo()  # rows and saves as users have them
    log = vit.Log(
        vit.argparse.Namespace(out=".", batch=8), ['{"images": 64}'], 0, 1000, torch.optim.SGD([torch.ones(1)])
    )

    def due(ago, step, leaving=False):
        log.saved = time.perf_counter() - ago
        return log.save_due(step, leaving)

    assert due(61, 9) and not due(61, 8) and not due(59, 9)  # with a row of the log
    assert due(0, 8, leaving=True)  # the end, or asked to stop
    log.rank = 1
    assert not due(61, 9)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_ctrl_c_leaves_at_once_but_a_second_sigterm_does_not(second):
    """Under torchrun SIGTERM to a whole group reaches a process twice: from the sender and from torchrun."""
    images, before = vit.Images(torch.zeros(8, 3, 4, 4, dtype=torch.uint8)), signal.getsignal(signal.SIGINT)
    namespace = vit.argparse.Namespace
    loop = vit.steps(images, namespace(batch=4, seed=0, workers=0), namespace(first=0, stop=9), "cpu")
    assert not next(loop)[2]
    signal.raise_signal(signal.SIGTERM)
    with contextlib.nullcontext() if second == signal.SIGTERM else pytest.raises(SystemExit):
        signal.raise_signal(second)
    step, _, last = next(loop)
    assert step == 1 and last
    with pytest.raises(SystemExit) as stop:
        next(loop)
    assert stop.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGINT) is before


@everywhere
def test_a_data_set_of_ones_own(method):
    train = vit.Images(Mine(40), torch.arange(40) % 4, "abcd")
    options = tiny("--steps", 2, "--img-size", 16, data="mine", method=method)
    result = MAIN[method](options, images=(train, train.subset(9)))
    assert result["step"] == 2 and "knn" in result
    result = MAIN[method](options[4:], images=(vit.Images(Mine(40), side=20), None))  # no labels, --data or --out
    assert result["checkpoint"] == f"runs/{method}-own/last.pt" and Path(f"runs/{method}-own/curve.png").exists()


class Own(vit.ViT):
    """A backbone of a user's own."""

    def __init__(self, **shape):
        super().__init__(**shape)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def embed(self, imgs, visible=None):
        return self.scale * super().embed(imgs, visible)


@everywhere
def test_a_backbone_of_ones_own(method, npz, capsys):
    MAIN[method](tiny("--steps", 12, method=method), backbone=Own)
    moved = [v for k, v in tensors(checkpoint()["net"]).items() if k.endswith("vit.scale")]
    assert moved and any(v != 1 for v in moved)
    net, config = vit.load_encoder("run/last.pt", backbone=Own)
    assert type(net) is Own and config["backbone"].endswith("test_runs.Own")
    with pytest.raises(vit.InputError, match=r"was trained with backbone \S*test_runs.Own: load_encoder"):
        vit.load_encoder("run/last.pt")
    MAIN[method](tiny("--steps", 1, "--init", "run/last.pt", out="again", method=method), backbone=Own)
    line = fails(MAIN[method], tiny("--steps", 1, "--init", "run/last.pt", out="other", method=method), capsys)
    assert "was trained with backbone" in line


# Wrong input: one line that says what is wrong and what to do, and exit code 2 ---------------------------------------


WRONG = {
    "--data nowhere": "--data nowhere",
    "--data .": "no images in",
    "--patch 5 --img-size 16": "not a multiple of --patch 5",
    "--batch 9 --accumulate 2": "--batch 9 of 64 images cannot be shared",
    "--batch 0": "argument --batch: must be 1 or more",
    "--drop-path 2": "argument --drop-path: must be between 0 and 1",
    "--size foo": "argument --size: invalid choice: 'foo'",
    "--device tpu": "--device tpu: not on this machine",
    "--init nowhere.pt": "no checkpoint at nowhere.pt",
    "--init theirs.pt": "no checkpoint of ours: python tools/convert.py theirs.pt makes one",
    "--init text.pt": "text.pt is not a readable checkpoint",
    "--init code.pt": "it wants to run",
    "--init wide.pt": "another shape: dim 64, not 32",
    "--out tiny.npz/run": "cannot be written",
    "--data pairs": "pairs holds images/ and masks/",
}


@dino_fast
@pytest.mark.parametrize("options", WRONG)
def test_wrong_input(method, npz, capsys, options):
    Path("text.pt").write_text("not a checkpoint")
    wide = vit.ViT(16, 4, dim=64, depth=2, heads=2)
    torch.save(wide.state_dict(), "theirs.pt")
    config = dict(wide.config, mean=[0.5] * 3, std=[0.2] * 3, feature="cls")
    torch.save(dict(encoder=wide.state_dict(), config=config), "wide.pt")
    torch.save({"model": functools.partial(print, "hello")}, "code.pt")
    os.makedirs("pairs/images"), os.makedirs("pairs/masks")
    line = fails(MAIN[method], tiny(*options.split(), method=method), capsys)
    assert WRONG[options] in line and line.count("error:") == 1


@dino_fast
def test_options_that_differ_from_the_run_in_the_folder(method, npz, capsys):
    MAIN[method](tiny("--steps", 2, method=method))
    line = fails(MAIN[method], tiny("--steps", 2, "--lr", 0.5, method=method), capsys)
    assert "--lr" in line and "(now 0.5)" in line and "--init run/last.pt" in line
    MAIN[method](tiny("--steps", 3, "--workers", 1, method=method))  # these may change
    MAIN[method](tiny("--steps", 3, data=os.path.abspath("tiny.npz"), method=method))  # the same data, spelt otherwise
    with np.load(npz) as z:
        np.savez(npz, **{k: v[:56] if "train" in k else v for k, v in z.items()})
    line = fails(MAIN[method], tiny("--steps", 4, method=method), capsys)
    assert "holds a run on 64 images, now there are 56: restore the images" in line


FOREIGN = dict(foreign={"model": {}}, code={"options": os.system}, old=dict(options={}, net={}, update={}, step=3))


@dino_fast
@pytest.mark.parametrize("damage", ["cut", "text", *FOREIGN])
def test_damaged_last_pt(method, npz, capsys, damage):
    MAIN[method](tiny("--steps", 2, method=method))
    file = Path("run/last.pt")
    if damage in FOREIGN:
        torch.save(FOREIGN[damage], file)
    else:
        file.write_bytes(file.read_bytes()[:5000] if damage == "cut" else b"hello")
    assert "last.pt is not a" in fails(MAIN[method], tiny("--steps", 4, method=method), capsys)


@dino_fast
def test_full_disk_keeps_the_old_checkpoint(method, npz, capsys):
    MAIN[method](tiny("--steps", 2, method=method))
    before, limits = Path("run/last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = fails(MAIN[method], tiny("--steps", 4, method=method), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line and "untouched" in line
    assert Path("run/last.pt").read_bytes() == before and not list(Path("run").glob("*.part"))


@dino_fast
def test_a_batch_above_the_images_shrinks_with_a_warning_and_a_warm_up_to_the_run(method, npz, capsys):
    MAIN[method](tiny("--epochs", 2, "--warmup", 5, batch=512, method=method))
    assert "only 64 images: --batch 64" in capsys.readouterr().err
    assert [log()[0]["args"][k] for k in ("batch", "warmup")] == [64, 2] and checkpoint()["step"] == 2


@dino_fast
def test_ten_loose_pictures_without_labels(method, capsys):
    os.makedirs("mine/2024/été")
    for i, img in enumerate(pictures(10)[0]):
        Image.fromarray(img).save(f"mine/{i}.png" if i < 5 else f"mine/2024/été/{i}.jpg")
    Path("mine/9.png").write_bytes(b"\x89PNG broken")
    result = MAIN[method](tiny("--epochs", 1, data="mine", batch=512, method=method))
    out, err = capsys.readouterr()
    assert (
        "no k-NN: this needs two classes" in out
        and "knn" not in result
        and "skipped 1 unreadable images of 11: mine/9.png" in err
    )


@everywhere
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(method, channels):
    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16, channels), dtype=np.uint8)
    np.savez("bands.npz", images=x)
    MAIN[method](tiny("--steps", 2, data="bands.npz", method=method))
    net, config = vit.load_encoder("run/last.pt")
    assert net(torch.randn(1, channels, 16, 8)).shape == (1, 9, 32) and len(config["mean"]) == channels


# Photos: what `python X.py --data my_photos` does, and says -----------------------------------------------------------


@everywhere
def test_without_a_gpu_the_preset_for_a_cpu_is_taken(method, folder, capsys):
    """Whatever the photos' size; a run's length is a number of images, and the first lines say what will be done."""
    options = f"--data {folder} --device cpu --steps 2 --out run" + " --method pcae" * (method == "pcae")
    MAIN[method](options.split())
    (out, err), args = capsys.readouterr(), log()[0]["args"]
    assert ("mae_pcae.py learns more" in err) == (method == "dino")
    patch = 4 if method in ("dino", "hybrid") else 2
    found = [args[k] for k in ("preset", "size", "img_size", "patch", "batch")]
    assert found == ["cpu", "nano", 16, patch, 64] and args["warmup"] == args["epochs"] / 10
    row = (mae_pcae.PCAE_OPTIONS if method == "pcae" else MODULE[method].OPTIONS)["epochs"][0]["cpu"]
    assert abs(args["epochs"] * 64 / int(row.split()[0]) - 1) < 0.01
    shape = rf"nano ViT of 1\.2 million parameters, 16 px in patches of {patch}$"
    assert re.search(rf"^{method} on {folder}, preset cpu .*: {shape}", out, re.M)
    plan = rf"{args['epochs']} epochs of 1 batches of 64 from 64 images, {args['epochs'] * 64} in all"
    assert re.search(rf"^{plan}, about [01]\.\d GiB of memory; cpu, ", out, re.M)
    assert re.search(
        r"k-NN of 24 test images before training .*: pixels [\d.]+ ± [\d.]+ %, untrained [\d.]+ ± [\d.]+ %", out
    )


@pytest.mark.parametrize("side,preset", [(32, "32"), (128, "96"), (400, "224")])
def test_with_a_gpu_presets_follow_the_images_and_local_crops_the_input(side, preset):
    args = vit.options("", dino.OPTIONS, ["--data", "photos"], method="dino")
    vit.settle(args, dino.OPTIONS, side)
    dino.check(args)
    published = {"32": (side, side // 2), "96": (96, 48), "224": (224, 96)}[preset]
    assert args.preset == preset and abs(args.local_size - published[1]) < args.patch
    assert args.img_size == published[0] and not args.local_size % args.patch


def test_more_memory_than_there_is_is_refused(npz, capsys, monkeypatch):
    pages = 2**30 // os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 2**30 // pages}[name])
    line = fails(dino.main, tiny("--size", "small", batch=64), capsys)
    assert re.search(r"a step needs about \d\.\d GiB of memory, and there are 1.0: give a smaller --batch", line)


def test_what_is_refused_for_memory_names_micro_batches_that_fit(npz, monkeypatch):
    net, args = network("--size", "small", "--batch", 64)
    need = functools.partial(vit.step_memory, args, net, dino.activations(args), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    free = 2**40
    whole = need()
    free = 0.6 * whole
    with pytest.raises(vit.InputError, match=r"give --accumulate \d+, a smaller --batch") as refused:
        need()
    args.accumulate = int(re.search(r"--accumulate (\d+)", str(refused.value))[1])
    assert need() <= free and 64 % args.accumulate == 0


@pytest.mark.slow
@pytest.mark.linux
@pytest.mark.parametrize("method,size,side", [("dino", "nano", 64), ("dino", "tiny", 96), ("mae", "tiny", 96)])
def test_the_count_of_memory_is_right_to_a_factor_of_1_5(method, size, side):
    os.makedirs("photos")
    for i in range(32):
        Image.radial_gradient("L").rotate(i).convert("RGB").save(f"photos/{i}.jpg")
    options = f"--data photos --preset 96 --size {size} --img-size {side} --batch 32 --steps 2 --epochs 20 --warmup 0"
    argv = [str(ROOT / SCRIPT[method]), *f"{options} --device cpu --precision fp32 --out run".split()]
    code = f"import resource, runpy, sys; sys.argv = {argv}; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300
    )
    counted = float(re.search(r"about ([\d.]+) GiB of memory", done.stdout)[1])
    measured = int(re.search(r"^peak (\d+)", done.stdout, re.M)[1]) / 2**20
    assert 1 / 1.5 < counted / measured < 1.5, (counted, measured)


def test_a_finished_run_and_a_changed_script_are_named(npz, capsys, monkeypatch):
    dino.main(tiny("--epochs", 1))
    capsys.readouterr()
    result = dino.main(tiny("--epochs", 1))
    out, err = capsys.readouterr()
    assert "run is already trained, 8 steps, nothing to do: give another --out" in out
    assert result["step"] == 8 and "changed" not in err
    dino.main(tiny("--epochs", 1, "--steps", 4, out="half"))
    Path("changed.py").write_text("# another loss")
    monkeypatch.setattr(dino, "__file__", "changed.py")
    dino.main(tiny("--epochs", 1, out="half"))
    assert "warning: the script or vit.py has changed since this run began" in capsys.readouterr().err
    line = fails(dino.main, tiny("--epochs", 1), capsys)
    assert "run was trained by another version of the script or vit.py: give another --out" in line


def test_a_run_that_learned_little_says_so(npz, capsys):
    dino.main(tiny("--epochs", 1, "--lr", 0))
    out = capsys.readouterr().out
    numbers = r"done in [\d.]+ minutes: k-NN [\d.]+ ± [\d.]+ % \(untrained [\d.]+, pixels [\d.]+\)"
    assert re.search(f"{numbers}; warning: little was learned, see .* see run/curve.png", out)
    dino.main(tiny("--epochs", 2, "--steps", 1, "--lr", 0, out="cut"))  # is not at its end
    assert "little was learned" not in capsys.readouterr().out


@everywhere
@pytest.mark.parametrize("preset", vit.PRESETS)
def test_every_preset_takes_two_steps(method, npz, preset):
    """With the preset's crops, temperatures and head; a smaller network, image and batch."""
    options = f"--data {npz} --out run --preset {preset} --size test --batch 8 --steps 2 --img-size 32 --patch 8"
    options += f" --device {DEVICE}" + " --method pcae" * (method == "pcae")
    options += " --prototypes 64 --hidden 64" * (method in ("dino", "hybrid"))
    assert MAIN[method](options.split())["step"] == 2
