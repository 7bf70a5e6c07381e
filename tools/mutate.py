"""Does a test notice? Changes one piece of code at a time, and runs fast tests until one fails.

    python tools/mutate.py                       # all changes, about half an hour of one core
    python tools/mutate.py dino.py hybrid.py

Works on a copy of the repository. Prints for each change its file, what the code became, and the test that failed, or
NONE. Ends with exit code 1 if a change was not noticed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # where a change of this file should be noticed, the likeliest first
    "dino.py": ["test_dino.py", "test_golden.py", "test_views.py", "test_runs.py"],
    "mae_pcae.py": ["test_mae_pcae.py", "test_golden.py", "test_runs.py"],
    "siameseim.py": ["test_siameseim.py", "test_golden.py", "test_views.py", "test_runs.py"],
    "hybrid.py": ["test_hybrid.py", "test_runs.py"],
    "vit.py": ["test_vit.py", "test_views.py", "test_knn.py", "test_dino.py", "test_golden.py", "test_runs.py"],
}
CHANGES = {  # file -> (what stands there, what it becomes)
    "dino.py": [
        ("different = 1 - torch.eye(", "different = 1 - 0 * torch.eye("),
        ("((teacher - center) / teacher_temp).softmax", "((teacher + center) / teacher_temp).softmax"),
        ("(student / student_temp).log_softmax", "(student / teacher_temp).log_softmax"),
        ("x = F.normalize(self.mlp(x), dim=-1)", "x = self.mlp(x)"),
        ("1 - momentum)\n    center.copy_", "momentum)\n    center.copy_"),
        ("center.copy_(torch.where(finite > 0, moved, center))", "center.copy_(moved)"),
        ("schedule.momentum, finite)", "1 - schedule.momentum, finite)"),
        ("args.clip, per_parameter=True)", "args.clip)"),
        ("if schedule.freeze_last_layer:", "if False:"),
        ("teacher_temp=start + ramp * (end - start)", "teacher_temp=start"),
        ("jitter = rand() < 0.8", "jitter = rand() < 0.2"),
        ("rand() < color * torch.tensor(solarize)", "rand() < torch.tensor(solarize)"),
        ('d["sigma"].flatten() * unit', 'd["sigma"].flatten()'),
    ],
    "mae_pcae.py": [
        ("[int(noise.shape[1] * (1 - ratio))]", "[int(noise.shape[1] * ratio)]"),
        (
            "latent = self.vit(imgs, visible)\n        pred = self.decode(latent, visible, hidden)",
            "latent = self.vit(imgs, hidden)\n        pred = self.decode(latent, visible, hidden)",
        ),
        ("x.var(dim=-1, keepdim=True) + 1e-6", "x.var(dim=-1, keepdim=True, correction=0) + 1e-6"),
        ("self.mask_token + gather_tokens(pos[:, 1:], wanted)", "self.mask_token + gather_tokens(pos[:, :-1], wanted)"),
        ("self.decoder_embed(latent) + visible_pos", "self.decoder_embed(latent)"),
        ("topk(n, dim=1, largest=False)", "topk(n, dim=1, largest=True)"),
        ("self.compress(imgs, hidden)", "self.compress(imgs, visible)"),
        ("self.teacher.embed(imgs, index)[:, 1:], []", "self.teacher.embed(imgs, index), []"),
        ("ema_update(self.teacher, self.vit, momentum, finite)", "pass"),
        ("schedule.weight_decay, args.clip)", "schedule.weight_decay, 0.0)"),
        ("[depth // 3 * i for i in range(3)]", "[depth // 3 * (i + 1) - 1 for i in range(3)]"),
    ],
    "siameseim.py": [
        ("ema_update(net.target, net.online, schedule.momentum, finite)", "pass"),
        ('x = blend(x, gray(x), d["keep_color"])', "pass"),
        ('d["sigma"].flatten() * unit', 'd["sigma"].flatten()'),
        ("c = mean_over_processes(c)", "c = c"),
        ("c += correlation(z) / args.accumulate", "c = correlation(z)"),
        (".argsort(dim=1)[:, hidden:]", ".argsort(dim=1)[:, :-hidden]"),
        ("(pred - target).square().mean() + weight * uniformity", "(pred - target).square().mean()"),
        ("return F.layer_norm(z, z.shape[-1:])", "return z"),
        ("torch.where(flip_a, 1 - in_a, in_a) - 0.5", "in_a - 0.5"),
        ("(10 * (length", "(-10 * (length"),
        ("patch_embed.requires_grad_(args.train_patch_embed)", "patch_embed.requires_grad_(True)"),
        ("F.pad(visible + 1, (1, 0))", "F.pad(visible, (1, 0))"),
        ("schedule.weight_decay, args.clip)", "schedule.weight_decay, args.clip, per_parameter=True)"),
    ],
    "hybrid.py": [
        ("loss = (1 - w) * mim + w * cl", "loss = w * mim + w * cl"),
        ("loss = (1 - w) * mim + w * cl", "loss = (1 - w) * mim + cl"),
        ("ema_update(net.teacher, net.student, schedule.momentum, finite)", "pass"),
        ("update_center(net.center, batch_mean, args.center_momentum, finite)", "pass"),
        ("args.clip, per_parameter=True)", "args.clip)"),
        ("both / (args.accumulate * scaler.get_scale())", "both / args.accumulate"),
    ],
    "vit.py": [
        ("self.blocks[-1](x, queries=1)", "self.blocks[-1](x[:, :1])"),
        ("bernoulli_(1 - p).div_((1 - p) or 1)", "bernoulli_(1 - p)"),
        ("params=[p for p in params if p.ndim > 1]", "params=[p for p in params if p.ndim > 3]"),
        ("((similar[:, :k] - similar[:, :1]) / temperature).exp()", "torch.ones_like(similar[:, :k])"),
        ("return peak * step / max(1, warmup - 1)", "return peak * step / warmup"),
        ("generator=seeded(seed, -1 - epoch))", "generator=seeded(seed, 0))"),
        ("kept = value.cumsum(dim=-1) - value < mass", "kept = value.cumsum(dim=-1) < mass"),
        ("x = x / dist.get_world_size()", "pass"),
        ("scaler.unscale_(optimizer)", "pass"),
        ("if step - self.moved >= 20:", "if False:"),
        ("optimizer.found_inf = 1 - finite", "optimizer.found_inf = 0 * finite"),
        ("return {k: to_device(v.chunk(world)[rank], device)", "return {k: to_device(v.chunk(world)[0], device)"),
        ("w = w * ((pixel > start) & (pixel < start + length))", "pass"),
        ("source = torch.where(source < n, source, 2 * n - 2 - source)", "source = source.clamp(max=n - 1)"),
        ("fits = (h >= 1) & (h <= side) & (w >= 1) & (w <= side)", "fits = (h >= 1) & (h <= side)"),
        ("+ 6 * shift", "+ shift"),
        ("torch._foreach_mul_(change, (1 - momentum) * finite)", "torch._foreach_mul_(change, (1 - momentum))"),
        ("x = x[:, :queries] + drop_path(", "x = x[:, :queries] * 1 + 0 * drop_path("),
        ("torch.manual_seed(((args.seed * 1_000_003 + step) * world + rank) % 2**63)", "pass"),
    ],
}


def notice(copy, file, was, became):
    """The name of the test that fails once `was` is `became` in this file of the copy, or None."""
    path = copy / file
    code = path.read_text()
    if was not in code:
        raise SystemExit(f"{file} has no {was!r}: bring CHANGES up to date")
    path.write_text(code.replace(was, became, 1))
    tests = [f"tests/{name}" for name in TESTS[file]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    text = subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout
    path.write_text(code)
    failed = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", text, re.MULTILINE)
    return failed and failed[1]


def main(files):
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        unneeded = shutil.ignore_patterns(".git", "runs", "data", "venv", ".venv", ".ci", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=unneeded)
        for file in files or CHANGES:
            for was, became in CHANGES[file]:
                test = notice(copy, file, was, became)
                missed += test is None
                print(f"{file:13} {test or 'NONE':60} {' '.join(became.split())}", flush=True)
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
