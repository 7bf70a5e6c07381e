"""How fast is a training step, and how much memory does it take? Ours, and side by side the authors' code.

    python bench.py                                            # DINO's step at 32 px, in the default precision and fp32
    python bench.py --size small --patch 16 --img-size 224 --local-size 96 --local-crops 8 --batch 4 --prototypes 65536
    git clone https://github.com/facebookresearch/dino /tmp/dino; python bench.py --against /tmp/dino

Each row runs in processes of its own, in turn (A B A B ...), so that a machine that slows down slows all alike; a row's
images/s is the median over all steps of all its turns. Ours is the script's own train_step, from decoded uint8 images:
it includes augmentation. The authors' step starts from crops that are already made, which flatters it: their pipeline
on PIL images comes on top. On a GPU theirs runs as shipped, in fp16; on a CPU in fp32, the only precision it has there.
Memory is the peak resident size less that just before the first step; on a GPU, the peak allocated.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import dino
from vit import SIZES, InputError, ViT, cli, launch, peak_memory


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--size", choices=SIZES, default="tiny", help="width, depth and heads of the network")
    add("--patch", type=int, default=4, help="patch, px")
    add("--img-size", type=int, default=32, help="input of the network, px")
    add("--local-size", type=int, default=16, help="their side, px")
    add("--local-crops", type=int, default=6, help="small crops of an image, seen by the student only")
    add("--prototypes", type=int, default=4096, help="K, outputs of the head; small data wants fewer")
    add("--batch", type=int, default=64, help="images in a step")
    add("--precision", nargs="+", default=["auto", "fp32"], choices=("auto", "fp32", "bf16", "fp16"), help="a row each")
    add("--against", metavar="DIR", help="a clone of facebookresearch/dino, to time beside ours")
    add("--steps", type=int, default=5, help="timed steps in a turn, after two that are not")
    add("--turns", type=int, default=3, help="turns of each row")
    add("--device", help="cuda, mps or cpu (the first that is there)")
    add("--compile", action="store_true", help="torch.compile, for a GPU: a minute first, then faster")
    add("--row", help=argparse.SUPPRESS)  # what a process started by this one measures
    return p.parse_args(argv)


def ours(args, device):
    """A function that does one step of dino.py on ready uint8 images."""
    options = ["--preset", "32", "--data", "demo.npz", "--device", device.type]
    for name in ("precision", "size", "patch", "img_size", "local_size", "local_crops", "batch", "prototypes"):
        options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    run = dino.get_args(options)
    shape = dict(SIZES[args.size], img_size=args.img_size, patch=args.patch)
    make = lambda p: dino.DINO(ViT(**shape, drop_path=p), dino.DINOHead(shape["dim"], args.prototypes))
    student, teacher = make(0.1), make(0.0)
    teacher.load_state_dict(student.state_dict())
    student, teacher = student.to(device), teacher.to(device).requires_grad_(False)
    if args.compile:
        student.compile(), teacher.compile()
    update, center = dino.Update([student], device, args.precision), torch.zeros(args.prototypes, device=device)
    update.set(1e-4, 0.04)
    mean, std = torch.full((3, 1, 1), 0.5, device=device), torch.full((3, 1, 1), 0.25, device=device)
    run.canvas = args.img_size if args.img_size <= 64 else 2 * args.img_size
    imgs = torch.randint(0, 256, (args.batch, 3, run.canvas, run.canvas), dtype=torch.uint8).to(device)

    def draw(step):
        return [dino.my_rows(d, 0, 1, device) for d in dino.draw_crops(run, step)]

    def step(i):
        dino.train_step(student, teacher, center, update, imgs, draw(i), run, 0.04, 0.996, mean, std)

    def augmentation(i):
        a, b = draw(i)
        dino.augment(imgs, a, [args.img_size] * 2, args.img_size / 224, mean, std)
        dino.augment(imgs, b, [args.local_size] * 2, args.img_size / 224, mean, std)

    return step, dict(augmentation=augmentation)


def authors(args, device):
    """A function that does one step of facebookresearch/dino, by its own functions, on ready crops."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)  # its loss needs one
    sys.path.insert(0, args.against)
    import main_dino
    import utils
    import vision_transformer as vits

    shape, dim = SIZES[args.size], SIZES[args.size]["dim"]

    def net(drop_path):
        size = dict(embed_dim=dim, depth=shape["depth"], num_heads=shape["heads"], mlp_ratio=4, qkv_bias=True)
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        size |= dict(img_size=[args.img_size], patch_size=args.patch, norm_layer=norm, drop_path_rate=drop_path)
        vit = vits.VisionTransformer(**size)
        return utils.MultiCropWrapper(vit, vits.DINOHead(dim, args.prototypes, norm_last_layer=True)).to(device)

    student, teacher = net(0.1), net(0.0)
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    loss_fn = main_dino.DINOLoss(args.prototypes, args.local_crops + 2, 0.04, 0.04, 0, 100).to(device)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student), lr=1e-4, weight_decay=0.04)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    crop = lambda n, s: [torch.randn(args.batch, 3, s, s, device=device) for _ in range(n)]
    crops = crop(2, args.img_size) + crop(args.local_crops, args.local_size)

    def step(i):
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            loss = loss_fn(student(crops), teacher(crops[:2]), 1)
        loss.item()  # it checks that the loss is finite, in every step
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(1, student, 1)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.data.mul_(0.996).add_((1 - 0.996) * new.detach().data)

    return step, {}


def measure(args):
    """Seconds of each timed step, memory in MiB, and seconds of parts, of one row; printed as JSON."""
    args.precision = "fp32" if args.row == "authors" else args.row.split()[-1]
    device, _, _ = launch(args)
    torch.manual_seed(0)
    step, parts = (authors if args.row == "authors" else ours)(args, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    before = peak_memory()

    def seconds(function, n):
        out = []
        for i in range(n):
            start = time.perf_counter()
            function(i)
            wait()
            out.append(time.perf_counter() - start)
        return out[2:]

    times = seconds(step, args.steps + 2)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_memory() - before
    parts = {k: statistics.median(seconds(f, args.steps + 2)) for k, f in parts.items()}
    print(json.dumps(dict(times=times, memory=memory, precision=args.precision, device=device.type, **parts)))


@cli
def main(argv=None):
    args = get_args(argv)
    if args.row:
        return measure(args)
    if args.against and not Path(args.against, "main_dino.py").exists():
        raise InputError(f"--against {args.against} is no clone of facebookresearch/dino: no main_dino.py in it")
    rows = [f"ours {p}" for p in args.precision] + ["authors"] * bool(args.against)
    turns = {row: [] for row in rows}
    for _ in range(args.turns):
        for row in rows:
            command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--row", row]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise InputError(f"the row '{row}' could not be measured: {done.stderr.strip().splitlines()[-1]}")
            turns[row].append(json.loads(done.stdout.splitlines()[-1]))
    result = dict(options=vars(args), threads=torch.get_num_threads(), torch=torch.__version__, rows={})
    base = statistics.median(t for turn in turns[rows[-1]] for t in turn["times"])
    base_memory = statistics.median(turn["memory"] for turn in turns[rows[-1]])
    crops = f"2+{args.local_crops} crops, K {args.prototypes}, batch {args.batch}"
    print(f"ViT {args.size}/{args.patch}, {args.img_size} px, {crops}; speed and memory beside {rows[-1]}")
    print(f"{'':14}{'precision':>10}{'images/s':>10}{'ms/step':>9}{'MiB':>8}{'augment':>9}")
    for row, seen in turns.items():
        ms = 1e3 * statistics.median(t for turn in seen for t in turn["times"])
        memory = statistics.median(turn["memory"] for turn in seen)
        share = statistics.median(turn.get("augmentation", 0) for turn in seen) * 1e3 / ms
        line = dict(images_per_s=args.batch / ms * 1e3, ms=ms, memory_mib=memory, augmentation=share)
        line |= dict(precision=seen[0]["precision"], speed=base * 1e3 / ms, memory=memory / max(1, base_memory))
        result["rows"][row] = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        print(
            f"{row:14}{seen[0]['precision']:>10}{args.batch / ms * 1e3:10.1f}{ms:9.1f}{memory:8.0f}{share:9.1%}"
            f"   {line['speed']:.2f}x, {line['memory']:.2f}x"
        )
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
