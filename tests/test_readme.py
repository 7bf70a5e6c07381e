"""The README, command by command, in an empty copy of the repository, made quick; and reproduce.sh from end to end."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, pictures
from PIL import Image

pytestmark = pytest.mark.slow
QUICK = "--size test --epochs 2 --steps 4 --batch 8 --warmup 0"  # what a training run's command gets besides


def copy():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "demo.npz"]:
        shutil.copy(file, ".")


def environment():
    """That of a shell in which the venv is active."""
    return dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OMP_NUM_THREADS="1")


def phone_picture(name, size=(400, 300), orientation=6):
    img = Image.effect_noise(size, 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    img.save(name, exif=exif)


def test_every_command_of_the_readme_runs():
    copy()
    phone_picture("cat.jpg")
    os.makedirs("my_photos/holiday")
    for i in range(12):
        phone_picture(f"my_photos/holiday/{i}.jpg", orientation=1 + i % 8)
    a, labels = pictures(64, side=32)
    np.savez("cifar10.npz", images=a, labels=labels)  # no network in a test: the loader of the real one has its own
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Try it") : text.index("## What to read")]
    lines = [line.split("  #")[0].strip() for line in section.splitlines() if re.match(r"    (python|torchrun) ", line)]
    lines = [line for line in lines if ".py" in line]
    assert len(lines) >= 10
    for line in lines:
        line = line.replace("--data cifar10", "--data cifar10.npz --out runs/cifar10")
        if re.search(r" (dino|mae_pcae)\.py", line) and "cat.jpg" not in line:
            line += f" {QUICK}" + (" --out runs/ablated" if "--ablate" in line else "")
            line += " --out runs/photos --img-size 32" if "my_photos" in line else ""
        if "--finetune" in line:
            line = line.replace("--epochs 10", "--epochs 1 --labels 0.1")
        line = line.replace("analyze.py", "analyze.py --quick")
        done = subprocess.run(line, shell=True, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    for name in ("last.pt", "log.jsonl", "curve.png", "attention.png"):
        assert Path("runs/dino-demo", name).exists()
    assert Path("runs/mae-demo/reconstruction-cat.png").exists() and Path("runs/analysis/analysis.png").exists()


def test_reproduce_goes_on_where_it_was_cut(npz):
    options = ["--only", "mae siameseim", "--data", npz, "--out", "out", "--minutes", "0.01", "--finetune-epochs", "1"]
    argv = ["bash", ROOT / "reproduce.sh", *options, "--", "--size", "test", "--patch", "4", "--batch", "8"]
    run = lambda: subprocess.run(
        [*argv, "--decoder-dim", "24"], env=environment(), capture_output=True, text=True, timeout=600
    )
    first = run()
    assert first.returncode == 0, first.stderr[-2000:]
    table = Path("out/table.md").read_text()
    assert re.search(r"\| mae \| \d+ \| \d+ (\| [\d.]+ ){4}\|\n\| siameseim ", table)
    before = {f: f.stat().st_mtime_ns for f in Path("out").rglob("*") if f.suffix in (".pt", ".json", ".png")}
    cut = Path("out/siameseim/linear.json")
    cut.unlink()
    assert run().returncode == 0 and Path("out/table.md").read_text() == table
    changed = [str(f) for f, t in before.items() if f.stat().st_mtime_ns != t]
    assert changed == [str(cut)], changed
