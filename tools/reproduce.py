"""Trains DINO, MAE, PCAE, SiameseIM and their hybrid for the same time, evaluates all, and writes the table.

    python tools/reproduce.py                                       # CIFAR-10, 60 minutes a method; meant for a GPU
    python tools/reproduce.py --cpu --data cifar10                  # a small network, one core a method, 100 minutes
    python tools/reproduce.py --cpu --data demo.npz --minutes 0     # 0: as many epochs as the preset has
    python tools/reproduce.py --only dino -- --size nano            # after --: for all trainings

In --out: one folder for each method and seed, and table.md, which is written again after every run. What is done is not
done again: to resume after a cut, give the same command; for other minutes, another --out. How many epochs the minutes
are follows from the speed of 100 steps. --cpu trains two at a time, each on one core.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = dict(dino=["dino.py"], mae=["mae_pcae.py"], pcae=["mae_pcae.py", "--method", "pcae"])
SCRIPTS |= dict(siameseim=["siameseim.py"], hybrid=["hybrid.py"])
SMALL = dict(preset=32, size="nano", batch=128)  # --cpu
DECODER = dict(decoder_dim=64, decoder_depth=2, decoder_heads=4)
HEAD = dict(patch=8, hidden=512, prototypes=1024, lr=2e-3, warmup=1, momentum=0.98, drop_path=0, local_crops=4)
LOCK = threading.Lock()
RECIPES = dict(
    dino=SMALL | HEAD,
    mae=SMALL | DECODER | dict(lr=4e-3, warmup=2),
    pcae=SMALL | DECODER | dict(lr=1e-3, warmup=2, momentum=0.9995),
    siameseim=SMALL | DECODER | dict(lr=2e-3, warmup=1, projector_depth=1, neg_weight=0.24),
    hybrid=SMALL | DECODER | HEAD | dict(mask_ratio=0.5, weight=0.2),
)

HEAD_LINE = "| | patch, px | seeds | million images | minutes | k-NN | untrained | linear probe | fine-tuned |"


def flags(options):
    return [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]


def run(words, log):
    """Runs a script of ours, which prints to the file `log`; where it fails, this program ends."""
    with open(log, "a") as f:
        code = subprocess.run([sys.executable, *map(str, words)], stdout=f, stderr=f).returncode
    if code:
        raise SystemExit(f"{log.read_text()[-1000:]}{words[0]} ended with {code}; all it printed is in {log}")


def train(args, method, folder, *more):
    script, *words = SCRIPTS[method]
    recipe = flags(RECIPES[method]) if args.cpu and not args.data.endswith("demo.npz") else []
    words += ["--data", args.data, "--out", folder, *args.device, *recipe, *more, *args.rest]
    folder.mkdir(parents=True, exist_ok=True)
    run([ROOT / script, *words], folder / "output.txt")


def epochs_that_fit(args, method):
    """The option for as many epochs as args.minutes are, by the speed of 100 steps."""
    if not args.minutes:
        return []
    file, trial = args.out / f"{method}.epochs", args.out / f"speed-{method}"
    if not file.exists():
        train(args, method, trial, *flags(dict(epochs=2, warmup=0, steps=100)))
        rows = [json.loads(line) for line in (trial / "log.jsonl").open()]
        speed = statistics.median(row["images_per_s"] for row in rows if "images_per_s" in row)
        file.write_text(str(max(2, round(args.minutes * 60 * speed / rows[0]["images"]))))
        shutil.rmtree(trial)
    return ["--epochs", file.read_text()]


def evaluate(args, script, folder, file, *words):
    """Runs an evaluation, unless its result is there."""
    part = file.with_suffix(".part")
    if not file.exists():
        run([ROOT / script, folder / "last.pt", "--json", part, *args.device, *words], file.with_suffix(".txt"))
        part.rename(file)


def one(args, method, seed):
    folder = args.out / f"{method}-{seed}"
    train(args, method, folder, *args.epochs[method], "--seed", str(seed))
    evaluate(args, "eval_knn.py", folder, folder / "knn.json", "--precision", "auto")
    evaluate(args, "evaluation/linear.py", folder, folder / "linear.json")
    short = dict(batch=64, mixup=0, drop_path=0) if args.cpu else {}
    if args.data.endswith("demo.npz"):  # so few steps, with layer decay, do not move the first blocks
        short["layer_decay"] = 1
    short |= dict(epochs=args.finetune_epochs, out=folder / "finetune")
    evaluate(args, "evaluation/finetune.py", folder, folder / "finetune.json", *flags(short))
    with LOCK:
        table(args.out)
    print(f"{method}, seed {seed}: done", flush=True)


def table(out):
    """Writes table.md of what is there so far: means, and standard deviations where there are several seeds."""
    read, lines = lambda file: json.loads(file.read_text())["results"], []
    near = lambda by_k: by_k[min(by_k, key=lambda k: abs(int(k) - 20))]  # of very small sets, fewer

    def cell(values):
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}" if values else ""

    for method in SCRIPTS:
        folders = [file.parent for file in sorted(out.glob(f"{method}-*/finetune.json"))]
        done = [d for d in folders if (d / "knn.json").exists() and (d / "linear.json").exists()]
        if not done:
            continue
        knn, logs = [read(d / "knn.json") for d in done], [(d / "log.jsonl").read_text().splitlines() for d in done]
        args, last = json.loads(logs[0][0])["args"], json.loads(logs[0][-1])
        minutes = [max(json.loads(line).get("seconds", 0) for line in log) / 60 for log in logs]
        values = [[near(r[r["feature"]]) for r in knn], [near(r["untrained"]) for r in knn]]
        values += [[read(d / "linear.json")["linear"] for d in done]]
        values += [[read(d / "finetune.json")["finetuned"] for d in done]]
        seen = f"{last['step'] * args['batch'] / 1e6:.2f} | {statistics.mean(minutes):.1f}"
        shape = [args["patch"], len(done), seen]
        lines.append("| " + " | ".join(map(str, [method, *shape, *map(cell, values)])) + " |")
    raw = f"| raw pixels | | | | | {near(knn[0]['pixels']):.1f} | | | |"
    (out / "table.md").write_text("\n".join([HEAD_LINE, "|---" * 9 + "|", raw, *lines]) + "\n")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    p.add_argument("--minutes", type=float, help="of training; 0: as many epochs as the preset has (60; --cpu: 100)")
    p.add_argument("--data", default="cifar10")
    p.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--finetune-epochs", type=int, help="(100 on a GPU, else 5)")
    p.add_argument("--cpu", action="store_true")
    p.add_argument("rest", nargs="*", help="after --: options of all trainings")
    args = p.parse_args(argv)
    args.device = ["--device", "cpu"] if args.cpu else []
    args.minutes = (100 if args.cpu else 60) if args.minutes is None else args.minutes
    args.finetune_epochs = args.finetune_epochs or (100 if torch.cuda.is_available() and not args.cpu else 5)
    if args.cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    args.epochs = {method: epochs_that_fit(args, method) for method in args.only}
    jobs = [(method, seed) for method in args.only for seed in range(args.seeds)]
    with ThreadPoolExecutor(2 if args.cpu else 1) as pool:
        list(pool.map(lambda job: one(args, *job), jobs))
    runs = [args.out / f"{method}-{seed}" for method, seed in jobs]
    words = [*(d / "last.pt" for d in runs), "--out", args.out / "analysis", "--results"]
    words += [d / name for d in runs for name in ("linear.json", "finetune.json")]
    if not (args.out / "analysis/analysis.json").exists():
        run([ROOT / "evaluation/analyze.py", *words, *args.device], args.out / "analysis.txt")
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
