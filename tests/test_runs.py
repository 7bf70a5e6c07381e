"""The contracts of a training run: resume, processes, micro-batches, signals, wrong input."""

import functools
import math
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from conftest import FILES, checkpoint, command, fails, log, losses, networks, pictures, same, start, tensors, tiny

import dino
import hybrid
import mae_pcae
import siameseim
import vit

SCRIPTS = {"dino": dino.main, "mae": mae_pcae.main, "pcae": mae_pcae.main, "siameseim": siameseim.main}
everywhere = pytest.mark.parametrize("method", SCRIPTS)
slow = [pytest.param(m, marks=pytest.mark.slow) for m in SCRIPTS if m != "dino"]
quick = ["dino", "mae", pytest.param("pcae", marks=pytest.mark.slow), "siameseim"]  # PCAE shares its file with MAE
scripts = pytest.mark.parametrize("method", quick)
dino_fast = pytest.mark.parametrize("method", ["dino", *slow])  # what is long, or vit.py's alone
EXACT = ["--precision", "fp32", "--drop-path", 0, "--log-every", 1]


def streamed(monkeypatch):
    """Makes even a small folder too large for memory, so that workers decode it."""
    monkeypatch.setattr(vit, "load_images", functools.partial(vit.load_images, max_bytes=0))


@everywhere
def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(method, npz):
    main = SCRIPTS[method]
    main(tiny("--steps", 20, "--drop-path", 0.1, out="straight", method=method))
    main(tiny("--steps", 10, "--drop-path", 0.1, method=method))
    main(tiny("--steps", 20, "--drop-path", 0.1, method=method))
    assert same(checkpoint("straight"), checkpoint()) == []
    assert [r["step"] for r in log() if "loss" in r] == sorted({r["step"] for r in log() if "loss" in r})


FOLLOWS = {
    "dino": (dino.main, "/teacher/", "/student/"),
    "pcae": (mae_pcae.main, "/net/teacher.", "/net/vit."),
    "siameseim": (siameseim.main, "/net/target.", "/net/online."),
    "hybrid": (hybrid.main, "/teacher/", "/nets/student."),
}


@pytest.mark.parametrize("method", FOLLOWS)
def test_the_teacher_begins_as_the_student_and_follows_it_by_momentum(method, npz):
    """By the loop itself: equal while nothing learns; then t = m t + (1 - m) s, with m of that step."""
    main, teacher, student = FOLLOWS[method]

    def run(out, *more):
        main(tiny(*more, "--momentum", 0.5, method=method, out=out))
        found = tensors(checkpoint(out))
        return [(v, found[student + k[len(teacher) :]]) for k, v in found.items() if k.startswith(teacher)]

    still = run("still", "--lr", 0, "--steps", 2)
    assert len(still) > 20 and all(torch.equal(t, s) for t, s in still)
    before, after = (run("run", "--warmup", 0, "--steps", steps) for steps in (1, 2))
    m = dino.cosine(1, 32, 0.5, 1.0)
    for (t, _), (moved, s) in zip(before, after, strict=True):
        torch.testing.assert_close(moved, m * t + (1 - m) * s, rtol=0, atol=1e-6)
    assert sum(not torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True)) > 20


@pytest.mark.parametrize("method", ["dino", "siameseim"])
def test_gradients_are_clipped_as_the_paper_s_authors_do(method, npz, monkeypatch):
    """DINO: each tensor's norm. SiameseIM: that of all together."""
    norms = []

    def step(adam):
        norms.extend(p.grad.norm().item() for g in adam.param_groups for p in g["params"] if p.grad is not None)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    SCRIPTS[method](tiny("--steps", 1, "--clip", 1e-3, method=method))
    largest, total = max(norms), math.hypot(*norms)
    assert largest <= 1.01e-3 and (total > 3e-3 if method == "dino" else 0.9e-3 < total <= 1.01e-3)


@dino_fast
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_restarts_change_nothing(method, folder, monkeypatch, workers):
    main = SCRIPTS[method]
    streamed(monkeypatch)
    options = functools.partial(tiny, "--workers", workers, data="photos", method=method)
    main(options("--steps", 10, out="straight"))
    main(options("--steps", 5))
    main(options("--steps", 10))
    assert same(checkpoint("straight"), checkpoint()) == []
    monkeypatch.setattr(vit, "load_images", vit.load_images.func)
    main(options("--steps", 10, out="memory"))  # nor does it matter where the images lie
    assert same(networks("memory"), networks()) == []


@dino_fast
def test_kill_9_and_resume(method, npz):
    """A run killed at a random moment, again and again, ends with the weights of one that was left alone."""
    SCRIPTS[method](tiny("--steps", 24, out="straight", method=method))
    argv, env = command(FILES[method], *tiny("--steps", 24, method=method))
    for target in (6, 14):
        process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 90
        while time.time() < deadline and process.poll() is None:
            rows = losses() if os.path.exists("run/log.jsonl") else {}
            if rows and max(rows) >= target:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -9
    SCRIPTS[method](tiny("--steps", 24, method=method))
    assert same(checkpoint("straight"), checkpoint()) == []


def nearly(a, b, name):
    """Two runs agree as the design defines it: losses, encoder output and weights to 1e-5; the key bias is exempt."""
    torch.testing.assert_close(
        torch.tensor([*losses(a).values()]), torch.tensor([*losses(b).values()]), rtol=1e-5, atol=1e-5
    )
    nets = [vit.load_encoder(f"{out}/last.pt", quiet=True)[0] for out in (a, b)]
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(nets[0](x), nets[1](x), rtol=1e-5, atol=1e-5)
    a, b = tensors(networks(a)), tensors(networks(b))
    for k in a:
        if k.endswith("qkv.bias"):  # its key part has a true gradient of zero: AdamW turns rounding into steps
            d = len(a[k]) // 3
            a[k][d : 2 * d] = b[k][d : 2 * d] = 0
        torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-5, msg=lambda m, k=k: f"{name} {k}: {m}")


@everywhere
def test_accumulation_is_the_whole_batch(method, npz):
    exact = [*EXACT, "--epochs", 5, *(["--norm", "layer"] if method == "siameseim" else [])]  # BatchNorm: of a forward
    SCRIPTS[method](tiny(*exact, batch=16, out="whole", method=method))
    SCRIPTS[method](tiny(*exact, "--accumulate", 4, batch=16, out="parts", method=method))
    assert len(losses("whole")) == 20
    nearly("whole", "parts", method)


@scripts
def test_two_processes_are_one(method, npz):
    SCRIPTS[method](tiny(*EXACT, "--epochs", 5, batch=16, out="one", method=method))
    parts = 1 if method == "siameseim" else 2  # its BatchNorm is global over processes, not over micro-batches
    options = tiny(*EXACT, "--epochs", 5, "--accumulate", parts, batch=16, out="two", method=method)
    done = start(FILES[method], *options, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes" in done.stdout
    nearly("one", "two", method)


@dino_fast
def test_as_a_user_starts_it(method, npz):
    done = start(FILES[method], *tiny("--steps", 3, method=method))
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r'"knn": [\d.]+', done.stdout.splitlines()[-1])
    again = start(FILES[method], *tiny("--steps", 3, method=method))  # a finished run prints its result
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


@dino_fast
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(method, npz, number):
    argv, env = command(FILES[method], *tiny("--epochs", 500, "--knn-every", 500, method=method))
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not os.path.exists("run/log.jsonl") or not losses():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "goes on from there" in text
    step = checkpoint()["step"]
    assert step >= 1 and f"stopped at step {step} " in text


@dino_fast
def test_one_run_in_a_folder_and_a_killed_one_does_not_block_the_next(method, npz):
    argv, env = command(FILES[method], *tiny("--epochs", 500, method=method))
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists("run/log.jsonl"):
        assert process.poll() is None
        time.sleep(0.05)
    second = start(FILES[method], *tiny("--epochs", 500, method=method))
    assert second.returncode == 2 and "another run is writing to run" in second.stderr
    process.kill()
    process.wait()
    assert start(FILES[method], *tiny("--epochs", 500, "--steps", 20, method=method)).returncode == 0


@dino_fast
def test_a_log_without_a_checkpoint_is_of_a_dead_run(method, npz):
    os.mkdir("run")
    vit.Path("run/log.jsonl").write_text('{"args": {}}\n{"step": 7, "seconds": 1e9}\n{"st')
    SCRIPTS[method](tiny("--steps", 2, method=method))
    assert log()[0]["args"]["batch"] == 8 and max(r.get("seconds", 0) for r in log()) < 1e6


@dino_fast
def test_steps_stop_early_and_change_no_schedule(method, npz):
    SCRIPTS[method](tiny("--steps", 9, "--log-every", 1, out="short", method=method))
    SCRIPTS[method](tiny("--log-every", 1, out="long", method=method))
    rates = {out: {r["step"]: r["lr"] for r in log(out) if "lr" in r} for out in ("short", "long")}
    assert max(rates["short"]) == 9 and max(rates["long"]) == 32
    assert all(rates["long"][s] == lr for s, lr in rates["short"].items())


@scripts
def test_the_log_has_what_the_design_promises(method, npz):
    SCRIPTS[method](tiny("--log-every", 2, method=method))
    rows = log()
    assert rows[0].keys() == {"args", "images"} and rows[0]["args"]["batch"] == 8 and rows[0]["images"] == 64
    assert rows[2].keys() == {"knn_pixels", "knn_untrained"}  # after the first step
    wanted = {"step", "epoch", "loss", "lr", "images_per_s", "data_wait", "memory_mib", "skipped", "seconds"}
    assert all(wanted <= r.keys() for r in rows[1:] if "loss" in r)
    assert [r["step"] for r in rows if "loss" in r] == [1, *range(2, 33, 2)]
    assert all(0 <= r["data_wait"] < 1 and r["memory_mib"] > 50 for r in rows[1:] if "loss" in r)
    assert [r["epoch"] for r in rows if "knn" in r] == [1, 2, 3, 4]


@scripts
def test_same_seed_same_run_and_another_seed_another(method, npz):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        SCRIPTS[method](tiny("--steps", 5, "--seed", seed, "--log-every", 1, out=out, method=method))
    assert losses("a") == losses("b") != losses("c")


@scripts
def test_init_from_a_run_and_from_an_encoder(method, npz):
    SCRIPTS[method](tiny("--steps", 8, out="first", method=method))
    SCRIPTS[method](tiny("--steps", 1, "--lr", 0, "--init", "first/last.pt", out="second", method=method))
    a, b = checkpoint("first"), checkpoint("second")
    for part in {"student", "net"} & a.keys():  # a teacher starts again as the student
        old, new = tensors(a[part]), tensors(b[part])
        assert all(torch.equal(old[k], new[k]) for k in old if not k.startswith(("/teacher", "/target")))
    torch.save({k: a[k] for k in ("encoder", "config")}, "bare.pt")  # as the files in weights/ are
    SCRIPTS[method](tiny("--steps", 1, "--lr", 0, "--init", "bare.pt", out="third", method=method))
    assert same(a["encoder"], checkpoint("third")["encoder"]) == []
    other = [
        "--img-size",
        24,
        "--init",
        "first/last.pt",
    ]  # positions are interpolated, so the rest starts anew: all of it
    SCRIPTS[method](tiny("--steps", 1, "--lr", 0, *other, out="fourth", method=method))
    if "center" in a:
        assert checkpoint("fourth")["center"].norm() < 0.5 * a["center"].norm()


@pytest.mark.slow
@scripts
def test_compile_on_a_cpu(method, npz):
    SCRIPTS[method](tiny("--steps", 2, "--precision", "fp32", "--log-every", 1, out="eager", method=method))
    SCRIPTS[method](
        tiny("--steps", 2, "--precision", "fp32", "--log-every", 1, "--compile", out="fused", method=method)
    )
    assert [*losses("fused").values()] == pytest.approx([*losses("eager").values()], rel=1e-3)
    assert tensors(networks("fused")).keys() == tensors(networks("eager")).keys()  # no _orig_mod.


@scripts
def test_fp16_with_its_scaler(method, npz):
    SCRIPTS[method](tiny("--steps", 3, "--precision", "fp16", "--log-every", 1, method=method))
    assert checkpoint()["update"]["scaler"]["scale"] > 0


# Wrong input: one line that names the thing and the mend, and exit code 2 -------------------------------------------


@dino_fast
@pytest.mark.parametrize(
    "options,words",
    [
        (["--data", "nowhere"], "--data nowhere"),
        (["--data", "."], "no images in"),
        (["--patch", "5", "--img-size", "16"], "not a multiple of --patch 5"),
        (["--batch", "9", "--accumulate", "2"], "--batch 9 cannot be shared"),
        (["--batch", "0"], "argument --batch: must be 1 or more"),
        (["--device", "cuda"], "--device cuda: not on this machine"),
        (["--init", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--init", "text.pt"], "text.pt is not a readable checkpoint"),
        (["--init", "code.pt"], "it wants to run"),
        (["--init", "wide.pt"], "another shape: dim 64 (here 32)"),
        (["--out", "tiny.npz/run"], "cannot be written"),
    ],
)
def test_wrong_input(method, npz, capsys, options, words):
    if "cuda" in options and torch.cuda.is_available():
        options, words = ["--device", "mps"], "--device mps: not on this machine"
    (vit.Path("text.pt")).write_text("not a checkpoint")
    torch.save(vit.ViT(16, 4, dim=64, depth=2, heads=2).state_dict(), "wide.pt")
    torch.save({"model": functools.partial(print, "hello")}, "code.pt")
    line = fails(SCRIPTS[method], tiny(*options, method=method), capsys)
    assert words in line and line.count("error:") == 1


@dino_fast
def test_options_that_differ_from_the_run_in_the_folder(method, npz, capsys):
    SCRIPTS[method](tiny("--steps", 2, method=method))
    line = fails(SCRIPTS[method], tiny("--steps", 2, "--lr", 0.5, method=method), capsys)
    assert "--lr" in line and "(now 0.5)" in line and "--init run/last.pt" in line
    SCRIPTS[method](tiny("--steps", 3, "--workers", 1, method=method))  # these may change


@dino_fast
@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "code"])
def test_damaged_last_pt(method, npz, capsys, damage):
    SCRIPTS[method](tiny("--steps", 2, method=method))
    file = vit.Path("run/last.pt")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "text":
        file.write_text("hello")
    elif damage == "foreign":
        torch.save({"model": {}}, file)
    else:
        torch.save({"options": os.system}, file)
    assert "last.pt is not a" in fails(SCRIPTS[method], tiny("--steps", 4, method=method), capsys)


@dino_fast
def test_full_disk_keeps_the_old_checkpoint(method, npz, capsys, monkeypatch):
    SCRIPTS[method](tiny("--steps", 2, method=method))
    before = vit.Path("run/last.pt").read_bytes()

    def full(state, f):
        f.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = fails(SCRIPTS[method], tiny("--steps", 4, method=method), capsys)
    assert "No space left on device" in line and "untouched" in line
    assert vit.Path("run/last.pt").read_bytes() == before and not vit.Path("run/last.pt.part").exists()


@dino_fast
def test_mends_with_a_warning(method, npz, capsys):
    SCRIPTS[method](tiny("--epochs", 2, "--warmup", 5, batch=512, method=method))
    err = capsys.readouterr().err
    assert "only 64 images: --batch 64" in err and "--warmup 2" in err
    assert log()[0]["args"]["batch"] == 64 and checkpoint()["step"] == 2


@dino_fast
def test_ten_loose_pictures_without_labels(method, capsys):
    from PIL import Image

    os.makedirs("mine/2024/été")
    for i, img in enumerate(pictures(10)[0]):
        Image.fromarray(img).save(f"mine/{i}.png" if i < 5 else f"mine/2024/été/{i}.jpg")
    vit.Path("mine/9.png").write_bytes(b"\x89PNG broken")
    result = SCRIPTS[method](tiny("--epochs", 1, data="mine", batch=512, method=method))
    out, err = capsys.readouterr()
    assert "no labels" in out and "knn" not in result and "skipped 1 unreadable images of 11: mine/9.png" in err


@dino_fast
def test_streamed_data_skips_broken_files_too(method, folder, monkeypatch):
    streamed(monkeypatch)
    vit.Path("photos/train/class0/000.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="unreadable image: .*000.png"):
        SCRIPTS[method](tiny("--epochs", 1, "--workers", 0, data="photos", method=method))


@scripts
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_and_non_square_input(method, channels):
    import numpy as np

    x = np.random.default_rng(0).integers(0, 256, (40, 16, 16, channels), dtype=np.uint8)
    np.savez("bands.npz", images=x)
    SCRIPTS[method](tiny("--steps", 2, "--img-size", 16, 8, data="bands.npz", method=method))
    net, config = vit.load_encoder("run/last.pt", quiet=True)
    assert net(torch.randn(1, channels, 16, 8)).shape == (1, 9, 32) and len(config["mean"]) == channels


@scripts
@pytest.mark.parametrize("preset", ["demo", "32", "96", "224"])
def test_every_preset_takes_two_steps(method, npz, preset):
    """With the preset's crops, temperatures and head; a smaller network, image and batch."""
    options = [
        "--data",
        npz,
        "--out",
        "run",
        "--preset",
        preset,
        "--size",
        "test",
        "--batch",
        8,
        "--steps",
        2,
        "--device",
        "cpu",
    ]
    options += ["--img-size", 32, "--patch", 8] + (["--prototypes", 64, "--local-size", 16] if method == "dino" else [])
    assert SCRIPTS[method]([*map(str, options)])["step"] == 2
