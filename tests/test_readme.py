"""As a reader starts them: the README's commands, made quick, reproduce.py, the notebook, the hub's entries."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

import hubconf
from conftest import ROOT, SCRIPT, environment

pytestmark = [pytest.mark.slow, pytest.mark.linux]
QUICK = "--size test --epochs 2 --steps 4 --batch 8 --warmup 0"  # what a training run's command gets besides
ACTIVE = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # as in a shell with the venv
NOT_HERE = ("--index-url", "HOST0", "cifar10", "imagenet", "pip install", "--help")  # downloads, and a GPU's


def copy_of_the_repository():
    for file in [
        *ROOT.glob("*.py"),
        ROOT / "demo.npz",
        *(ROOT / f for f in ("examples", "weights", "evaluation", "tools")),
    ]:
        (shutil.copytree if file.is_dir() else shutil.copy)(file, file.name)


def test_every_command_of_the_readme_runs():
    copy_of_the_repository()
    text = (ROOT / "README.md").read_text()
    section = text[: text.index("## Your own photos")]
    lines = [line.split("  #")[0].strip() for line in section.splitlines() if re.match(r"    (python|torchrun) ", line)]
    lines = ["python dino.py", *(line for line in lines if not any(word in line for word in NOT_HERE))]
    assert len(lines) >= 12
    for line in lines:
        if re.search(r" (dino|mae_pcae)\.py", line):
            line += f" {QUICK}" + (" --img-size 32 --local-size 16" if "examples" in line else "")
        if "finetune" in line:
            line = line.replace("--epochs 10", "--epochs 1 --labels 0.1")
        line = line.replace("analyze.py", "analyze.py --quick")
        line = line.replace("bench.py", "bench.py --steps 1 --turns 1 --batch 4")
        done = subprocess.run(line, shell=True, env=ACTIVE, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        if line.startswith("python eval"):
            last = json.loads(done.stdout.splitlines()[-1])
            assert last.keys() == {"task", "checkpoint", "method", "data", "args", "results"}
    for name in ("last.pt", "log.jsonl", "curve.png", "attention.png"):
        assert Path("runs/dino-demo", name).exists()
    assert Path("runs/mae-demo/reconstruction-picture.png").exists() and Path("runs/analysis/analysis.png").exists()


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r'src="([^"]+)"', text) + re.findall(r"\]\(([^)h#][^)]*)\)", text)
    assert len(named) >= 5 and [name for name in named if not (ROOT / name).exists()] == []
    titles = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()]
    places = re.findall(r"\]\(#([^)]*)\)", text)
    assert places and set(places) <= set(titles)


ROWS = {m: f"weights/{m}-cifar10.jsonl" for m in SCRIPT} | {
    "mae-long": "weights/mae-cifar10-long.jsonl",
    "dino-short": "docs/figures/cifar10-dino-short-evaluations.jsonl",
}


@pytest.mark.parametrize("row", ROWS)
def test_results_and_readme_have_the_numbers_of_the_evaluations(row):
    read = lambda file: [json.loads(line) for line in (ROOT / file).read_text().splitlines()]
    knn, linear, tuned = (evaluation["results"] for evaluation in read(ROWS[row]))
    log = read(f"docs/figures/cifar10-{row}.jsonl")
    args, speed = log[0]["args"], statistics.median(r["images_per_s"] for r in log if "images_per_s" in r)
    images = args["epochs"] * (50000 // args["batch"]) * args["batch"]
    seen = f"{images / 1e6:.2f} | {images / speed / 60:.1f} | {knn[knn['feature']]['20']:.1f} |"
    rest = f"{linear['linear']:.1f} | {tuned['finetuned']:.1f} |"
    results, readme = ((ROOT / f).read_text().replace("*", "") for f in ("RESULTS.md", "README.md"))
    assert f"| {args['patch']} | {args['epochs']} | {seen} {knn['untrained']['20']:.1f} | {rest}" in results
    assert f"| {args['patch']} | {seen} {rest}" in readme


def test_reproduce_resumes_where_it_was_cut(npz):
    options = f"--cpu --data {npz} --out out --seeds 2 --minutes 0.01 --finetune-epochs 1 --only".split()
    small = "-- --size test --patch 4 --batch 8 --decoder-dim 24"
    argv = [sys.executable, ROOT / "tools/reproduce.py", *options, "mae", "siameseim", *small.split()]
    run = lambda: subprocess.run(argv, env=ACTIVE, capture_output=True, text=True, timeout=900)
    first = run()
    assert first.returncode == 0, first.stderr[-2000:]
    table = Path("out/table.md").read_text()
    row = r"\| mae \| 4 \| 2 \| [\d.]+ \| [\d.]+ (\| [\d.]+ ± [\d.]+ ){4}\|\n\| siameseim \| 4 \| 2 "
    assert re.search(row, table), table
    before = {f: f.stat().st_mtime_ns for f in Path("out").rglob("*.json")}
    cut = Path("out/siameseim-1/linear.json")
    cut.unlink()
    assert run().returncode == 0 and Path("out/table.md").read_text() == table
    changed = [str(f) for f, t in before.items() if f.stat().st_mtime_ns != t]
    assert changed == [str(cut)], changed


def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other tests more threads would wait for each other
    copy_of_the_repository()
    notebook = nbformat.read(ROOT / "tour.ipynb", as_version=4)
    drawn = lambda: sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))
    assert drawn() == 8 and (ROOT / "tour.ipynb").stat().st_size < 1.5e6  # those that are committed
    nbclient.NotebookClient(notebook, timeout=600).execute()  # raises where a cell does
    assert drawn() == 8


def test_the_hub_entries_give_the_encoders_of_weights():
    assert all(callable(vars(hubconf)[f"{m}_cifar10"]) for m in SCRIPT)
    net, config = torch.hub.load(str(ROOT), "dino_cifar10", source="local")
    again, _ = torch.hub.load(str(ROOT), "encoder", str(ROOT / "weights/dino-cifar10.pt"), source="local")
    assert config["method"] == "dino" and torch.equal(net.cls_token, again.cls_token)
