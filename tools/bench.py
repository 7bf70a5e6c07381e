"""How fast is a training step, and how much memory does it take?

    python tools/bench.py                                 # DINO's step at 32 px, in the default precision and in fp32
    python tools/bench.py --rows mae pcae "pcae --mask-ratio 0.85" --size base --patch 16 --img-size 224 --batch 8
    python tools/bench.py --rows dino mae pcae siameseim hybrid --batch 1024 --compile     # on a GPU

A row is a method (dino, mae, pcae, siameseim, hybrid) with options of its script. Options that this does not have
go to every row; without them preset 32 and batch 64. tools/against.py times the authors' code beside ours.

Each row runs in processes of its own, in turn (A B A B ...), so that a machine that slows down slows all alike; a row's
images/s is the median over all steps of all its turns. A step is the script's own train_step on decoded uint8 images as
the loader gives them, with waiting for them, random draws and augmentation. A second table has the share of each phase.
Memory is the peak resident size less that just before the first step; on a GPU, the peak allocated. GMACs: of all
matrix products of a step, forward and backward, for one image. MFU: the share of the products that the machine could do
in that time, as measured on one large product in the row's precision beside it.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import time
import timeit
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dino
import hybrid
import mae_pcae
import siameseim

# isort: off
from vit import InputError  # 1 network
from vit import DTYPES, adamw, shard  # 3 training step
from vit import Images, in_order, stream  # 4 images
from vit import COUNT, cli, launch, options, settle, vit_kwargs  # 7 runs

METHODS = dict(dino=(dino, dino.DINO), mae=(mae_pcae, mae_pcae.MAE), pcae=(mae_pcae, mae_pcae.PCAE))
METHODS |= dict(siameseim=(siameseim, siameseim.SiameseIM), hybrid=(hybrid, hybrid.Hybrid))
PHASES = ("data", "augment", "forward", "backward", "optimiser", "ema")


def run_args(row, rest):
    """The options of a row's script, with defaults filled in. A row: "mae --mask-ratio 0.85"."""
    method, *own = shlex.split(row)
    if method not in METHODS:
        raise InputError(f"--rows {row}: begin with one of {', '.join(METHODS)}")
    script = METHODS[method][0]
    table = script.OPTIONS | (mae_pcae.PCAE_OPTIONS if method == "pcae" else {})
    args = options(script.__doc__, table, ["--preset", "32", "--batch", "64", *rest, *own], method=method)
    settle(args, table, 32)
    if method in ("dino", "hybrid"):
        dino.check(args)
    return args


def our_step(args, device):
    """A function (i, uint8 images) that does one step of a method, and the parts that `clocked` watches."""
    script, make = METHODS[args.method]
    torch.manual_seed(0)
    net = make(vit_kwargs(args, 3), args, [0.5] * 3, [0.25] * 3).to(device)
    optimizer, scaler = adamw(net, args.precision)
    schedule = SimpleNamespace(lr=1e-4, weight_decay=0.04, momentum=0.996, teacher_temp=0.04, freeze_last_layer=False)
    if args.compile:
        net.compile()

    def step(i, imgs):
        draws = shard(script.sample_step(args, i, imgs.shape[-1]), device)
        script.train_step(net, optimizer, scaler, imgs, draws, schedule, args)

    return step, dict(script=script, net=net, optimizer=optimizer)


@contextlib.contextmanager
def clocked(parts, wait):
    """A dict of the seconds spent in each phase of our_step, measured by wrapping the functions that do it."""
    script, net, inside, spent = parts["script"], parts["net"], [], {}
    augment = [(script, "sample_step"), *((part, "augment") for part in (net, getattr(net, "mae", net)))]
    optimiser = [(script, "optimizer_step")]
    ema = [(module, "ema_update") for module in (script, mae_pcae) if hasattr(module, "ema_update")]
    watched = dict(augment=augment, backward=[(torch.Tensor, "backward")], optimiser=optimiser, ema=ema[:1])

    def timed(phase, function):
        def wrapper(*args, **kwargs):
            if inside:  # one phase within another counts once
                return function(*args, **kwargs)
            wait()
            inside.append(phase)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            spent[inside.pop()] += time.perf_counter() - start
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for phase, places in watched.items():
            spent[phase] = 0.0
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, timed(phase, getattr(owner, name))))
        yield spent


def ceiling(device, dtype, wait):
    """Multiplications a second of a large matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    wait()
    return n**3 / min(timeit.repeat(lambda: (a @ b, wait()), number=1, repeat=10))


def peak_memory(device):
    """Peak memory, MiB: on a GPU what was allocated there, else what the process had; 0 if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return 0


def measure(run, steps, build):
    """Seconds of each timed step, memory in MiB, seconds by phase, and use of the machine, of one row.

    build: our_step, or a function (args, device) that returns another step and no parts.
    """
    device = launch(run)
    step, parts = build(run, device)
    side = run.img_size if run.img_size <= 64 else 2 * run.img_size  # what the loader would give
    images = Images(torch.randint(0, 256, (run.batch, 3, side, side), dtype=torch.uint8))
    loader = stream(images, in_order(images, run.batch) * (2 * steps + 3), device, run.workers)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(n):
        """Seconds of n steps each, and of waiting for images."""
        times, waits = [], []
        for i in range(n):
            wait()
            start = time.perf_counter()
            imgs = next(loader)
            waits.append(time.perf_counter() - start)
            step(i, imgs)
            wait()
            times.append(time.perf_counter() - start)
        return times, waits

    before = peak_memory(device)
    result = dict(times=timed(steps + 2)[0][2:], precision=run.precision, device=device.type, batch=run.batch)
    result["memory"] = peak_memory(device) - (before if device.type != "cuda" else 0)
    if parts:
        with clocked(parts, wait) as spent:
            times, waits = timed(steps)
        spent["data"] = sum(waits)
        spent["forward"] = sum(times) - sum(spent.values())
        result["phases"] = {k: spent[k] / steps for k in PHASES}
    fused = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)  # the counter sees no fused attention on a CPU
    with FlopCounterMode(display=False) as count, fused:
        step(0, next(loader))
    result["gmacs"] = count.get_total_flops() / 2e9 / run.batch
    most = ceiling(device, DTYPES[run.precision], wait)
    return result | dict(mfu=result["gmacs"] * 1e9 * run.batch / statistics.median(result["times"]) / most)


def table(turns):
    """Prints both tables; returns the numbers of each row. turns: row -> the results of its turns."""
    result, last, width = {}, list(turns.values())[-1], max(15, *map(len, turns))
    middle = lambda seen, key: statistics.median(turn[key] for turn in seen)
    base = statistics.median(t for turn in last for t in turn["times"])
    print(f"last columns: beside {list(turns)[-1]}")
    print(f"{'':{width}}  precision  images/s  ms/step     MiB    GMACs    MFU   speed memory")
    for row, seen in turns.items():
        ms = 1e3 * statistics.median(t for turn in seen for t in turn["times"])
        batch, gmacs = seen[0]["batch"], seen[0]["gmacs"]
        line = dict(images_per_s=batch / ms * 1e3, ms=ms, memory_mib=middle(seen, "memory"), gmacs=gmacs)
        line |= dict(mfu=middle(seen, "mfu"), batch=batch, precision=seen[0]["precision"])
        line["speed"] = line["images_per_s"] * base / last[0]["batch"]
        line["memory"] = line["memory_mib"] / max(1, middle(last, "memory"))
        if "phases" in seen[0]:
            line["phases_ms"] = {k: 1e3 * statistics.median(turn["phases"][k] for turn in seen) for k in PHASES}
        result[row] = line
        numbers = f"{line['images_per_s']:10.1f}{ms:9.1f}{line['memory_mib']:8.0f}{gmacs:9.3f}{line['mfu']:7.0%}"
        print(f"{row:{width}} {line['precision']:>10}{numbers}   {line['speed']:.2f}x  {line['memory']:.2f}x")
    print(f"\n{'share of a step':{width}} " + "".join(f"{name:>11}" for name in PHASES))
    for row, line in result.items():
        if "phases_ms" in line:
            total = sum(line["phases_ms"].values())
            print(f"{row:{width}} " + "".join(f"{t / total:11.1%}" for t in line["phases_ms"].values()))
    return result


@cli
def main(argv=None, script=(__file__,), others=None):
    """others: {a row: function(args, device)}, for steps that are not ours; script: the command that has them."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.add_argument("--rows", nargs="+", help="each a method with options of its script (dino, and dino in fp32)")
    p.add_argument("--steps", **COUNT, default=5, help="timed steps in a turn, after two that are not")
    p.add_argument("--turns", **COUNT, default=3, help="turns of each row")
    p.add_argument("--row", help=argparse.SUPPRESS)  # what a process started by this one measures
    args, rest = p.parse_known_args(argv)
    rows = args.rows or ["dino"]
    if len(rows) == 1 and not others and "--precision" not in " ".join([*rows, *rest]):
        rows.append(f"{rows[0]} --precision fp32")
    builders = {row: our_step for row in rows}
    for prefix, build in (others or {}).items():  # with the first row's options
        builders[prefix + rows[0][len(rows[0].split()[0]) :]] = build
    parsed = {row: run_args(rows[0] if build is not our_step else row, rest) for row, build in builders.items()}
    if args.row:
        return print(json.dumps(measure(parsed[args.row], args.steps, builders[args.row])))
    turns = {row: [] for row in builders}
    for _ in range(args.turns):
        for row in turns:
            command = [sys.executable, *script, *(sys.argv[1:] if argv is None else argv), "--row", row]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
                raise InputError(f"the row '{row}' could not be measured: {why}")
            turns[row].append(json.loads(done.stdout.splitlines()[-1]))
    result = dict(options=vars(args), rest=rest, threads=torch.get_num_threads(), torch=torch.__version__)
    result["rows"] = table(turns)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
