"""A Vision Transformer, and the files around it: images in, weights and checkpoints in and out.

This is the one file that every script imports: the network (Dosovitskiy et al., arXiv 2010.11929; the pre-norm variant
of DeiT and DINO), then image files, checkpoints, and a run's folder. Parameter names are timm's, so weights travel.

Letters in shape comments, here and in every script:
    B images   C channels   V views   N patch tokens   D width   H heads   K prototypes   P patch
    S side of a square image, px   (h, w) height and width: of images in px, of a grid in patches
"""

import argparse
import copy
import functools
import json
import math
import os
import pickle
import re
import signal
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------- the network

SIZES = {  # timm and DINO name them ViT-Ti, S, B, L, H; "nano" is the size for a CPU, "test" for tests
    "test": dict(dim=32, depth=2, heads=2),
    "nano": dict(dim=128, depth=6, heads=4),
    "tiny": dict(dim=192, depth=12, heads=3),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
    "huge": dict(dim=1280, depth=32, heads=16),
}
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)  # --precision


class InputError(ValueError):
    """Something the user gave is wrong: the message names it and the mend. `cli` turns it into exit code 2."""


def sincos(y, x, dim):
    """Fixed sine-cosine position embedding of arbitrary positions (MAE; Transformer, section 3.5, in two dimensions).

    y, x: any equal shape (...), in units of patches. Returns (..., dim): sin, cos of x, then sin, cos of y, as MAE's.
    Raises InputError where dim is not a multiple of 4.
    """
    if dim % 4:
        raise InputError(f"a width of {dim} is no multiple of 4, as sine-cosine positions need")
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # a Mac's GPU has no float64
    omega = 10000 ** -(torch.arange(dim // 4, dtype=exact, device=x.device) / (dim // 4))
    x, y = x[..., None].to(exact) * omega, y[..., None].to(exact) * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).float()


def drop_path(x, p):
    """Stochastic depth (Huang et al., arXiv 1603.09382): zero a residual branch for a share p of the samples."""
    if p == 0:
        return x
    return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - p).div_(1 - p)


class OneDNN(torch.autograd.Function):
    """x Wᵀ + b and its gradients by oneDNN. PyTorch's own fp32 product is MKL's, half as fast on AMD's (RESULTS.md)."""

    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # None: a build of torch without oneDNN

    @staticmethod
    def product(x, weight, bias=None):
        return OneDNN.operator(x, weight, bias, "none", [], None)

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return OneDNN.product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight), (for_x, for_weight, for_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            OneDNN.product(grad, weight.T) if for_x else None,
            OneDNN.product(rows.T, x.flatten(0, -2).T) if for_weight else None,
            rows.sum(dim=0) if for_bias else None,
        )


def linear(x, weight, bias=None):
    """F.linear, (..., D) -> (..., out); in fp32 on a CPU by oneDNN, if that is there and nothing casts or compiles."""
    suits = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    suits = suits and x.ndim > 1 and x.numel() and not torch.is_autocast_enabled("cpu")
    if suits and OneDNN.operator and not torch.compiler.is_compiling():
        return OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise InputError(f"a width of {dim} cannot be shared by {heads} attention heads")
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def split(self, x):
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)

    def maps(self, x):  # (B, N, D) -> (B, H, N, N): rows are queries and sum to one
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def forward(self, x, queries=None):
        q, k, v = self.split(x)
        q = q[:, :, :queries]
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # the fused backward is 6x slower there
            x = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = Linear(dim, hidden), nn.GELU(), Linear(hidden, dim)


class Block(nn.Module):
    def __init__(self, dim, heads, drop_path=0.0, mlp_ratio=4, norm=None):
        super().__init__()
        norm = norm or functools.partial(nn.LayerNorm, eps=1e-6)
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, mlp_ratio * dim)
        self.drop_path = drop_path

    def forward(self, x, queries=None):
        """(B, N, D) -> (B, N, D). With `queries`, only the first so many tokens are computed (all are attended to)."""
        p = self.drop_path if self.training else 0
        x = x[:, :queries] + drop_path(self.attn(self.norm1(x), queries), p)
        return x + drop_path(self.mlp(self.norm2(x)), p)


class ViT(nn.Module):
    """Vision Transformer with a CLS token: images (B, C, height, width) -> normalised tokens (B, 1+N, D), CLS first.

    Another image size than `img_size` is accepted if the patch divides it; positions are then interpolated (bicubic,
    to an explicit size, in fp32). DINO interpolates by a scale factor plus 0.1 patches, which samples slightly other
    places: at such sizes entries of CLS differ by about 0.02. Raises InputError (a ValueError)
    where the patch does not divide the image. The pieces `embed`, `blocks` and `norm` can be called one by one.
    """

    def __init__(
        self, img_size=224, patch=16, in_chans=3, dim=384, depth=12, heads=6, pos="learned", norm=True, drop_path=0.0
    ):
        super().__init__()
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        self.config = dict(
            img_size=size, patch=patch, in_chans=in_chans, dim=dim, depth=depth, heads=heads, pos=pos, norm=norm
        )
        self.patch, self.grid, self.dim = patch, self.grid_of(size, patch), dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim), requires_grad=pos == "learned")
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()  # SiameseIM's encoder has none
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if pos == "sincos":
            y, x = torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")
            self.pos_embed.data = F.pad(sincos(y.flatten(), x.flatten(), dim), (0, 0, 1, 0))[None]  # CLS: zeros

    @staticmethod
    def grid_of(size, patch):
        if size[0] % patch or size[1] % patch:
            raise InputError(f"the image size {size[0]}x{size[1]} is not a multiple of the patch, {patch}")
        return size[0] // patch, size[1] // patch

    def positions(self, grid):
        """Position embedding for a grid (h, w): (1, 1+hw, D)."""
        if grid == self.grid:
            return self.pos_embed
        pos = rearrange(self.pos_embed[:, 1:].float(), "1 (h w) d -> 1 d h w", h=self.grid[0])
        pos = F.interpolate(pos, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], rearrange(pos, "1 d h w -> 1 (h w) d")], dim=1)

    def embed(self, imgs, keep=None):
        """Images to CLS and patch tokens with positions, (B, 1+N, D); with `keep` (B, n) only those patches."""
        pos = self.positions(self.grid_of(imgs.shape[-2:], self.patch)).expand(len(imgs), -1, -1)
        cls, pos = self.cls_token + pos[:, :1], pos[:, 1:]
        x = rearrange(imgs, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        if keep is not None:  # before the projection: what is hidden costs nothing
            x, pos = (t.gather(1, keep[..., None].expand(-1, -1, t.shape[-1])) for t in (x, pos))
        proj = self.patch_embed["proj"]  # a convolution of stride P is a linear layer on patches
        return torch.cat([cls, linear(x, proj.weight.flatten(1), proj.bias) + pos], dim=1)

    def forward(self, imgs):
        x = self.embed(imgs)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def cls(self, imgs):
        """forward(imgs)[:, 0], (B, D): all but the CLS token are left out of the last block, which needs no others."""
        x = self.embed(imgs)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, queries=1))[:, 0]

    def layers(self, imgs):
        """Tokens after each block, each through the final norm: a list of depth x (B, 1+N, D)."""
        x, out = self.embed(imgs), []
        for block in self.blocks:
            x = block(x)
            out.append(self.norm(x))
        return out

    def attention(self, imgs, layer=-1):
        """Softmax attention of one block, (B, H, 1+N, 1+N); row 0 is where the CLS token looks."""
        x = self.embed(imgs)
        for block in self.blocks[:layer]:
            x = block(x)
        block = self.blocks[layer]
        return block.attn.maps(block.norm1(x))

    def encode(self, imgs, feature="cls"):
        """One vector per image: feature "cls" (CLS token) or "mean" (mean patch token), (B, D); "both": (B, 2D)."""
        return self.cls(imgs) if feature == "cls" else pooled(self(imgs), feature)


def pooled(x, feature):
    """Tokens (B, 1+N, D) to their CLS token, their mean patch token, or both side by side: (B, D) or (B, 2 D)."""
    cls, mean = x[:, 0], x[:, 1:].mean(dim=1)
    return dict(cls=cls, mean=mean, both=torch.cat([cls, mean], dim=1))[feature]


# ------------------------------------------------------------------------------------------------------------- files


def cli(main):
    """Decorator for main(argv): an InputError becomes one line on stderr and exit code 2, a dead worker's end one line
    and exit code 1.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            result = main(argv)
            # All is printed and saved. Gloo's teardown aborts after that, one time in twenty: leave without it.
            if dist.is_initialized() and main.__module__ == "__main__":
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            return result
        except InputError as e:
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            hint = "out of memory? The same command goes on from the last checkpoint; --workers 0 does without them"
            print(f"{Path(sys.argv[0]).name}: error: a process that decodes images died ({hint})", file=sys.stderr)
            raise SystemExit(1) from None
        finally:
            Run.leave_behind()

    return wrapped


# Images ---------------------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"}
BROKEN = (OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError)  # Pillow raises every one of these,
BROKEN += (struct.error, Image.DecompressionBombError)  # and these, on some file


def decode(file, side):
    """An image file (or open binary file) as uint8 RGB (3, h, w), its short side resized to `side` px, upright."""
    with Image.open(file) as img:
        img.draft("RGB", (side, side))  # JPEG: decode at 1/2, 1/4, 1/8 where that is still larger than needed
        img = ImageOps.exif_transpose(img)
        if img.mode.startswith(("I", "F")):  # 16 bits and more: Pillow would clip at 255
            x = np.asarray(img, dtype=np.float64)
            img = Image.fromarray((x * 255 / max(x.max(), 65535 if img.mode[0] == "I" else 1e-9)).astype(np.uint8))
        if "A" in img.mode or "transparency" in img.info:  # what shows through is white
            img = img.convert("RGBA")
            img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
        img = img.convert("RGB")
        w, h = img.size
        if max(w, h) > 4 * min(w, h):  # a strip: keep its middle, or its long side would be huge
            img = ImageOps.fit(img, (min(w, 4 * h), min(h, 4 * w)))
            w, h = img.size
        if min(w, h) != side:
            size = (max(side, round(w * side / h)), side) if w > h else (side, max(side, round(h * side / w)))
            img = img.resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()


def square(img, offset=0.5):
    """The (C, S, S) square of (C, h, w) whose place along the long side is `offset`, in [0, 1]."""
    h, w = img.shape[-2:]
    s = min(h, w)
    y, x = int((h - s) * offset), int((w - s) * offset)
    return img[..., y : y + s, x : x + s]


def read_square(file, side, channels=3):
    """The middle square of one image file of a user's, for a network of 3 channels or 1: uint8 (1, C, side, side)."""
    try:
        img = square(decode(file, side))[None]
    except BROKEN as e:
        raise InputError(f"{file} is not a readable image ({e})") from None
    if channels not in (1, 3):
        raise InputError(f"{file} is an image of 3 channels, the network takes {channels}")
    return img if channels == 3 else img.float().mean(dim=1, keepdim=True).round().byte()


class Images(torch.utils.data.Dataset):
    """Square uint8 images of one split: `images[i, offset]` is (C, S, S). Made by load_images.

    files: paths (strings), or None with `pixels`: uint8 (N, C, S, S), or a list of (C, h, w) where shapes differ.
    labels: (N,) int64, numbered from 0, or None. classes: their names. side: S, px.
    """

    def __init__(self, files=None, pixels=None, labels=None, classes=(), side=None):
        self.files, self.pixels, self.labels, self.classes, self.side = files, pixels, labels, list(classes), side
        self.channels = 3 if pixels is None else pixels[0].shape[0]

    def __len__(self):
        return len(self.files if self.pixels is None else self.pixels)

    def __getitem__(self, key):
        i, offset = key
        if self.pixels is not None:
            return square(self.pixels[i], offset)
        for j in range(i, i + 100):  # a file that cannot be read is replaced by the next that can
            name = self.files[j % len(self)]
            try:
                return square(decode(name, self.side), offset)
            except BROKEN as e:
                warnings.warn(f"skipped an unreadable image: {name} ({type(e).__name__}: {e})", stacklevel=2)
        raise InputError(f"100 unreadable images in a row, the last one {name}")

    def stats(self):
        """Mean and standard deviation of each channel over at most 1,000 images, in [0, 1]: two lists."""
        sums = [[(self[i, 0.5].double() / 255).pow(k).mean((1, 2)) for k in (1, 2)] for i in spaced(len(self), 1000)]
        mean, square_mean = (torch.stack(s).mean(0) for s in zip(*sums, strict=True))
        return mean.tolist(), (square_mean - mean**2).clamp(min=1e-6).sqrt().tolist()

    def pick(self, index):
        """The images of these indices, in this order."""
        index = list(index)
        labels = None if self.labels is None else self.labels[index]
        if self.pixels is None:
            return Images([self.files[i] for i in index], None, labels, self.classes, self.side)
        pixels = self.pixels[index] if torch.is_tensor(self.pixels) else [self.pixels[i] for i in index]
        return Images(None, pixels, labels, self.classes, self.side)

    def subset(self, n):
        """At most n images, evenly spaced, so that every class keeps its share."""
        return self if n >= len(self) else self.pick(spaced(len(self), n))


def spaced(n, count):
    """At most `count` indices below n, evenly spaced."""
    return np.linspace(0, n - 1, min(n, count)).astype(int).tolist()


def list_images(root):
    """All image files below a folder, sorted, links followed once. 100,000 files take well under a second."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        key = os.stat(folder)
        if (key.st_dev, key.st_ino) in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add((key.st_dev, key.st_ino))
        found += [os.path.join(folder, f) for f in files if os.path.splitext(f)[1].lower() in SUFFIXES and f[0] != "."]
    return sorted(found)


def folder_split(root, split):
    """Files and class names (or None) of a folder in one of three layouts: train/ and val/ or test/; classes; loose."""
    parts = {d.name.lower(): d for d in root.iterdir() if d.is_dir()}
    other = parts.get("test") or parts.get("val")
    base = root if "train" not in parts else other if other and split == "test" else parts["train"]
    files = list_images(base)
    if not files:
        raise InputError(f"no images in {base} (looked for {' '.join(sorted(SUFFIXES))})")
    return files, class_names(files, base), "train" in parts and other is not None


def class_names(files, base):
    """The first folder below `base` of each file; None where a file lies in `base` itself, or all in one folder."""
    names = [os.path.relpath(f, base).split(os.sep) for f in files]
    if any(len(n) == 1 for n in names) or len({n[0] for n in names}) == 1:
        return None
    return [n[0] for n in names]


def load_npz(file, split, label="labels"):
    """Arrays of an .npz: MedMNIST's keys (train_images, train_labels, test_images, ...) or images and labels."""
    try:
        with np.load(file, allow_pickle=False) as z:
            test = next((part for part in ("test", "val") if f"{part}_images" in z), None)
            prefix = "" if "train_images" not in z else f"{test}_" if test and split == "test" else "train_"
            images, labels, own = z[f"{prefix}images"], z.get(f"{prefix}{label}"), prefix != "" and test is not None
    except KeyError:
        raise InputError(f"{file} holds neither train_images nor images: see --data in the help") from None
    except Exception as e:  # zipfile, zlib and numpy raise a dozen kinds on damaged bytes
        raise InputError(f"{file} is not a readable .npz of plain arrays ({e})") from None
    if bytes in (type(images), type(labels)):  # so numpy hands out a member that is no array
        raise InputError(f"{file} is not a readable .npz of plain arrays")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise InputError(f"{file}: images must be uint8 (N, H, W) or (N, H, W, C), not {images.dtype} {images.shape}")
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)  # grey to RGB
    if labels is not None:  # several for each image, or not one for each: no classes
        labels = labels.reshape(-1) if labels.ndim and labels.size == len(labels) == len(images) else None
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels, own


def load_images(data="demo.npz", split="train", side=None, max_bytes=2**31, quiet=False, label="labels"):
    """The images of one split ("train" or "test") as `Images`, squares of `side` px (None: as they are, .npz only).

    data: "demo.npz", any .npz, "cifar10", "cifar100" (downloaded into data/ on first use), a folder with train/ and
    test/ (or val/) of class folders, a folder of class folders, or a folder of loose images at any depth. Labelled
    images without a test split of their own give every tenth image to it. Sets of up to max_bytes once decoded are held
    in memory; their broken files are skipped, counted and named. In larger sets a broken file is named and replaced by
    the next one. Raises InputError if nothing usable is there.
    """
    path = Path(data)
    if data in ("cifar10", "cifar100"):
        from torchvision import datasets

        try:
            cifar = getattr(datasets, data.upper())("data", train=split == "train", download=True)
        except (OSError, RuntimeError) as e:
            raise InputError(f"{data} could not be downloaded into data/ ({e}); give a folder of images") from None
        pixels, names = torch.from_numpy(cifar.data).permute(0, 3, 1, 2), np.array(cifar.targets)
        own, files = True, None
    elif data == "demo.npz" and not path.exists():
        return load_images(str(Path(__file__).with_name("demo.npz")), split, side, max_bytes, quiet, label)
    elif path.is_file() and path.suffix == ".npz":
        (pixels, names, own), files = load_npz(path, split, label), None
    elif path.is_dir():
        (files, names, own), pixels = folder_split(path, split), None
        side = side or min(decode_first(files).shape[-2:])
    else:
        raise InputError(f"--data {data}: no such .npz file or folder (or cifar10, cifar100, demo.npz)")

    classes, labels = [], None
    if names is not None:
        classes, labels = np.unique(np.asarray(names), return_inverse=True)
        classes, labels = [str(c) for c in classes], torch.from_numpy(labels.reshape(-1)).long()
    if not own and names is not None:
        n = len(files if pixels is None else pixels)
        pick = [i for i in range(n) if (i % 10 == 9) == (split == "test")] or list(range(n))
        files, pixels = (files and [files[i] for i in pick]), (pixels if pixels is None else pixels[pick])
        labels = None if labels is None else labels[pick]
    if pixels is not None and side and min(pixels.shape[-2:]) != side:
        pixels = torch.cat([resize(x, side) for x in pixels.split(1000)])
    images = Images(files, pixels, labels, classes, side or min(pixels.shape[-2:]))
    if pixels is None and len(files) * 3 * side * side <= max_bytes:
        images = decode_all(images, quiet)
    return images


def image_side(data):
    """The side of a data set's images before any resizing, px: what presets are chosen by."""
    path = Path(data)
    if data in ("cifar10", "cifar100"):
        return 32
    if path.is_dir():
        return min(decode_first(folder_split(path, "train")[0]).shape[-2:])
    return load_images(data).side


def resize(x, side):
    """uint8 (B, C, h, w), short side resized to `side` px (bicubic, antialiased)."""
    h, w = x.shape[-2:]
    size = (side, max(side, round(w * side / h))) if h < w else (max(side, round(h * side / w)), side)
    return F.interpolate(x.float(), size=size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()


def decode_first(files):
    """The first readable file of a list, at its own size: (3, h, w)."""
    for name in files[:100]:
        try:
            with Image.open(name) as img:
                return decode(name, min(img.size))
        except BROKEN:
            pass
    raise InputError(f"none of the first {min(100, len(files))} images can be read, such as {files[0]}")


def decode_all(images, quiet=False):
    """Decodes files into memory, with progress. Pillow decodes outside Python's lock: threads are enough."""
    from concurrent.futures import ThreadPoolExecutor

    def read(name):
        try:
            return decode(name, images.side)
        except BROKEN as e:
            return f"{name} ({type(e).__name__}: {e})"

    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
        done = pool.map(read, images.files)
        done = list(tqdm(done, "decoding", len(images), leave=False, disable=True if quiet else None))
    good = [i for i, x in enumerate(done) if torch.is_tensor(x)]
    bad = [x for x in done if not torch.is_tensor(x)]
    if bad and not quiet:
        print(f"skipped {len(bad)} unreadable images of {len(done)}: {'; '.join(bad[:5])}", file=sys.stderr)
    if not good:
        raise InputError(f"none of the {len(done)} images can be read, such as {bad[0]}")
    pixels = [done[i] for i in good]
    if len({p.shape for p in pixels}) == 1:
        pixels = torch.stack(pixels)
    labels = None if images.labels is None else images.labels[good]
    return Images(None, pixels, labels, images.classes, images.side)


def stream(images, batches, device="cpu", workers=2):
    """Yields uint8 (B, C, S, S) on the device for each (indices, offsets) of `batches`; files go through workers."""
    device = torch.device(device)
    whole = torch.is_tensor(images.pixels) and images.pixels.shape[-1] == images.pixels.shape[-2]
    if whole:
        pixels = images.pixels
        if device.type == "cuda" and pixels.numel() < torch.cuda.mem_get_info(device)[0] // 4:
            pixels = pixels.to(device)  # the set itself lies on the device: a batch is an index
        for indices, _ in batches:
            yield pixels[torch.as_tensor(indices).to(pixels.device, non_blocking=True)].to(device, non_blocking=True)
        return
    keys = (list(zip(i, u, strict=True)) for i, u in batches)
    if images.pixels is not None:
        for key in keys:
            yield torch.stack([images[k] for k in key]).to(device, non_blocking=True)
        return
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=keys, num_workers=workers, worker_init_fn=in_worker, pin_memory=device.type == "cuda"
    )
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def in_order(images, batch):
    """What stream() takes to go through all images once: their indices, and the middle square of each."""
    return [(i.tolist(), [0.5] * len(i)) for i in torch.arange(len(images)).split(batch)]


def in_worker(_):
    """A process that decodes: signals are its parent's business (torchrun and schedulers send them to all at once, and
    the parent needs it to the end of the step), and so is the lock on the run's folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if Run.lock:
        Run.lock.close()


def prepare(imgs, img_size, mean, std):
    """uint8 (B, C, S, S) -> network input (B, C, height, width) for evaluation: resize, centre crop, normalise.

    Above 64 px the crop is 7/8 of the resized image, as 224 of 256 px are on ImageNet, unless it has that size already.
    """
    x = imgs.float() / 255
    h, w = img_size
    if x.shape[-2:] != (h, w):
        side = max(h, w) if max(h, w) <= 64 else round(max(h, w) * 8 / 7)
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        y0, x0 = (side - h) // 2, (side - w) // 2
        x = x[..., y0 : y0 + h, x0 : x0 + w]
    mean, std = (torch.tensor(s, device=x.device).view(1, -1, 1, 1) for s in (mean, std))
    return (x - mean) / std


# Checkpoints ----------------------------------------------------------------------------------------------------------


def save_checkpoint(file, state):
    """Writes tensors and plain types to a temporary file, then moves it in place: never half a checkpoint."""
    file = Path(file)
    part = file.with_name(file.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    except (OSError, RuntimeError) as e:  # torch.save on a full disk raises RuntimeError
        part.unlink(missing_ok=True)
        raise InputError(f"could not save {file} ({e}); what was saved there before is untouched") from None


def load_checkpoint(file):
    """Reads a checkpoint without running any code in it. Raises InputError that says what is wrong with the file."""
    if not Path(file).is_file():
        raise InputError(f"no checkpoint at {file}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold their options so
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL (\S+)", str(e))
        what = f"it wants to run {name[1]}: refused" if name else "neither weights nor a checkpoint"
    except Exception as e:  # of damaged bytes, torch's readers raise any kind, some without a word
        what = (str(e) or type(e).__name__).splitlines()[0][:100]
    raise InputError(f"{file} is not a readable checkpoint ({what})")


PREFIXES = re.compile(r"^(module|backbone|_orig_mod|teacher|student|encoder|model|vit|net|base_encoder)\.")


def load_encoder(file, strict=True, quiet=False):
    """A ViT with the weights of a checkpoint, and what is needed to use it: (vit, config).

    Reads ours (last.pt, weights/*.pt), the authors' (DINO, MAE, SiameseIM) and timm's state dicts; wrappers' prefixes
    are stripped. config: the ViT's arguments, mean, std (lists, of [0, 1] pixels) and feature ("cls" or "mean").
    Raises InputError if a parameter of the ViT is missing or has another shape, unless strict=False.
    """
    found = load_checkpoint(file)
    try:
        return build_encoder(file, found, strict, quiet)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:  # odd contents
        raise InputError(f"{file} holds no ViT that can be built ({type(e).__name__}: {e})") from None


def build_encoder(file, found, strict, quiet):
    """load_encoder of what was found in the file."""
    config = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], feature="cls")
    if isinstance(found, dict) and isinstance(found.get("config"), dict):
        config.update(found["config"])
    for key in ("encoder", "teacher", "model", "state_dict", "student"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    weights = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        while PREFIXES.match(str(name)):
            name = PREFIXES.sub("", name)
        if torch.is_tensor(value) and not value.is_complex():
            weights[name] = value.float()
    if "pos_embed" not in weights or "patch_embed.proj.weight" not in weights:
        raise InputError(f"{file} holds no ViT: no pos_embed and patch_embed.proj.weight in it")
    if "dim" not in config:  # not ours: read the shape off the weights
        dim, in_chans, patch, _ = weights["patch_embed.proj.weight"].shape
        side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, weights) if m)
        heads = next((s["heads"] for s in SIZES.values() if s["dim"] == dim), dim // 64)
        config.update(img_size=[side * patch] * 2, patch=patch, in_chans=in_chans, dim=dim, depth=depth, heads=heads)
        config.update(pos="learned", norm="norm.weight" in weights)
    keys = ("img_size", "patch", "in_chans", "dim", "depth", "heads", "pos", "norm")
    height, width, *sizes = [*config["img_size"], *(config[k] for k in keys[1:6])]
    if not all(type(s) is int and s > 0 for s in (height, width, *sizes)) or config["dim"] % config["heads"]:
        raise ValueError("sizes are " + ", ".join(f"{k} {config[k]}" for k in keys[:6]))
    vit = ViT(**{k: config[k] for k in keys})
    own = vit.state_dict()
    good = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    missing = sorted(own.keys() - good.keys())
    extra = sorted(weights.keys() - good.keys())
    if not quiet:
        print(f"{file}: {len(good)}/{len(own)} tensors of the ViT matched", file=sys.stderr)
        if extra:
            print(
                f"  not used: {len(extra)} ({', '.join(extra[:4])}{', ...' if len(extra) > 4 else ''})", file=sys.stderr
            )
        if not config["norm"]:
            print("  this encoder has no final norm (SiameseIM): identity", file=sys.stderr)
    missing += [k for k in extra if k.startswith("blocks.") and k not in own]  # such as LayerScale: another function
    if missing and strict:
        raise InputError(f"{file}: {len(missing)} tensors missing, of another shape or unknown: {missing[:4]}")
    vit.load_state_dict(good, strict=False)
    return vit.eval(), config


# ---------------------------------------------------------------------------- runs: options, devices, folder, log, k-NN


def common_options(p, presets):
    """The options that every method script has; those marked * get their default from a preset."""
    add = p.add_argument
    add("--data", default="demo.npz", help="demo.npz, any .npz, cifar10, cifar100, or a folder of images")
    add("--out", help="folder for last.pt, log.jsonl and pictures; a run found there goes on (runs/<method>-<data>)")
    add("--preset", choices=presets, help="defaults of the options marked * (chosen by the size of the images)")
    add("--epochs", type=positive, help="* length of the run; the schedules follow it")
    add("--steps", type=positive, help="stop after so many steps, counted from the run's beginning; schedules stay")
    add("--batch", type=positive, help="* images in an optimiser step, over all processes and micro-batches")
    add("--accumulate", type=positive, default=1, help="micro-batches in a step: less memory; only drop path differs")
    add("--lr", type=float, help="* learning rate for batch 256; scaled with the batch")
    add("--warmup", type=float, help="* epochs in which the learning rate rises")
    add("--drop-path", type=float, help="* stochastic depth, in training")
    add("--size", choices=SIZES, help="* width, depth and heads of the network")
    add("--patch", type=positive, help="* patch, px")
    add("--img-size", type=int, nargs="+", help="* input of the network, px: one number, or height and width")
    add(
        "--canvas",
        type=positive,
        help="side to which images are decoded (up to 64 px --img-size, else at most twice that)",
    )
    add("--workers", type=int, default=2, help="processes that decode images, where a set does not fit in memory")
    add("--device", help="cuda, mps or cpu (the first that is there)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 if the hardware has it",
    )
    add("--seed", type=int, default=0, help="of weights, order, crops, colours and masks")
    add("--init", metavar="FILE", help="start from the weights of a checkpoint, ours or the authors'")
    add("--compile", action="store_true", help="torch.compile, for a GPU: a minute first, then faster")
    add("--log-every", type=positive, default=10, help="steps between lines of log.jsonl")
    add("--knn-every", type=positive, help="epochs between k-NN measurements (a tenth of the run)")


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def resolve(args, presets, method):
    """Fills in what the preset and the data decide."""
    side = image_side(args.data)
    auto = "demo" if Path(args.data).name == "demo.npz" else "32" if side <= 64 else "96" if side <= 160 else "224"
    args.preset = args.preset or auto
    for name, value in presets[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.img_size = args.img_size or side // args.patch * args.patch
    args.img_size = [args.img_size] * 2 if isinstance(args.img_size, int) else (args.img_size * 2)[:2]
    if any(s < args.patch or s % args.patch for s in args.img_size):
        raise InputError(f"--img-size {args.img_size} is not a multiple of --patch {args.patch}: change one of them")
    top = max(args.img_size)
    args.canvas = args.canvas or (top if top <= 64 else max(top, min(2 * top, side)))
    args.knn_every = args.knn_every or max(1, args.epochs // 10)
    ablation = f"-{args.ablate}" if getattr(args, "ablate", None) else ""
    args.out = args.out or f"runs/{method}-{Path(args.data).stem or 'data'}{ablation}"
    return args


def launch(args):
    """Device, rank and number of processes; torchrun sets the environment, without it there is one process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = args.device or next(k for k in has if has[k])
    if not has.get(kind.split(":")[0]):
        raise InputError(f"--device {kind}: not on this machine, which has {', '.join(k for k in has if has[k])}")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if args.precision == "auto":
        cpu = Path("/proc/cpuinfo")
        units = (
            device.type == "cpu"
            and cpu.exists()
            and ("avx512_bf16" in (flags := cpu.read_text()) or "amx_bf16" in flags)
        )
        gpu = device.type == "cuda"
        args.precision = "bf16" if units or gpu and torch.cuda.is_bf16_supported(False) else "fp16" if gpu else "fp32"
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def load_splits(args, rank):
    """Training images, and test images or None without labels."""

    def load():
        train = load_images(args.data, "train", args.canvas, quiet=rank > 0)
        return train, load_images(args.data, "test", args.canvas, quiet=True) if train.labels is not None else None

    train, test = in_turn(load, rank)
    if test is None or test.labels is None:
        return train, None
    number_alike(train, test)
    return train, test


def load_labelled(args, config, side, rank, world, reader):
    """Training and test images of args.data, `side` px, for a read-out: a dict. reader: who asks, for errors."""
    load = lambda: {s: load_images(args.data, s, side, quiet=rank > 0) for s in ("train", "test")}
    sets = in_turn(load, rank)
    if sets["train"].labels is None or sets["test"].labels is None:
        raise InputError(f"--data {args.data} has no labels: {reader} needs class folders, or labels in the .npz")
    if sets["train"].channels != config["in_chans"]:
        raise InputError(
            f"{args.checkpoint} takes {config['in_chans']} channels, {args.data} has {sets['train'].channels}"
        )
    number_alike(sets["train"], sets["test"])
    if min(map(len, sets.values())) < world:
        raise InputError(f"--data {args.data} has fewer images than there are processes")
    return sets


def in_turn(load, rank):
    """load() on process 0, which may have to download, then on the others."""
    if rank > 0:
        dist.barrier()
    loaded = load()
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return loaded


def number_alike(train, test):
    """Numbers the classes of two splits alike, also where one of them lacks some."""
    names = [*train.classes, *(c for c in test.classes if c not in train.classes)]
    test.labels = torch.tensor([names.index(c) for c in test.classes])[test.labels]
    train.classes = test.classes = names


def check_plan(args, n, world, rank):
    """Mends, with a warning, a batch larger than the data and a warm-up longer than the run; refuses uneven shares."""
    share = world * args.accumulate
    if args.batch > n >= share:
        args.batch = n // share * share
        if rank == 0:
            print(f"warning: there are only {n} images: --batch {args.batch}", file=sys.stderr)
    if args.batch % share or args.batch > n:
        raise InputError(
            f"--batch {args.batch} cannot be shared by {world} process(es) x {args.accumulate} micro-batches"
        )
    if args.warmup > args.epochs:
        args.warmup = args.epochs
        if rank == 0:
            print(f"warning: the warm-up is longer than the run: --warmup {args.warmup}", file=sys.stderr)


def start_from(file, parts, vit, config):
    """--init: the encoder of a checkpoint, or all `parts` as far as they fit where it is a run of the same method."""
    state, (encoder, found) = load_checkpoint(file), load_encoder(file)
    differ = [k for k in ("patch", "in_chans", "dim", "depth", "heads", "norm") if found[k] != config[k]]
    if differ:
        what = ", ".join(f"{k} {found[k]} (here {config[k]})" for k in differ)
        raise InputError(f"--init {file} has another shape: {what}")
    encoder.pos_embed.data = encoder.positions(vit.grid)
    vit.load_state_dict(encoder.state_dict())
    config.update(mean=found["mean"], std=found["std"])
    if found.get("method") != config["method"]:
        return
    for name, part in parts.items():
        new, old = (p if isinstance(p, dict) else {"": p} for p in (state_of(part), state.get(name, {})))
        if any(k not in old or old[k].shape != v.shape for k, v in new.items()):
            return  # all or none: a centre without its head would be noise
        restore(part, state[name])


def state_of(part):
    return part if torch.is_tensor(part) else part.state_dict()


def restore(part, state):
    part.copy_(state) if torch.is_tensor(part) else part.load_state_dict(state)


def knn(train, train_labels, test, test_labels, ks=(20,), temperature=0.07, chunk_bytes=2**28):
    """Weighted k-NN (Wu et al., arXiv 1805.01978; DINO, appendix F.1): a neighbour votes exp(cosine / temperature).

    train (M, D), test (N, D): features, any length. labels: int64, numbered from 0. Returns {k: (top-1, top-5)} in
    percent; k is at most M, and with fewer than 5 classes top-5 is among all.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    hits = {k: torch.zeros(2, device=train.device) for k in ks}
    for x, y in zip(*(t.split(max(1, chunk_bytes // (4 * len(train)))) for t in (test, test_labels)), strict=True):
        similar, index = (x @ train.T).topk(min(max(ks), len(train)), dim=1)
        for k in ks:
            votes = torch.zeros(len(x), classes, device=x.device)
            weight = ((similar[:, :k] - similar[:, :1]) / temperature).exp()  # over the nearest's: none is inf
            votes.scatter_add_(1, train_labels[index[:, :k]], weight)
            best = votes.sort(dim=1, descending=True, stable=True)[1][:, : min(5, k)]  # ties: the lower label
            right = best == y[:, None]
            hits[k] += torch.stack([right[:, 0].sum(), right.sum()])
    return {k: tuple((100 * h / len(test)).tolist()) for k, h in hits.items()}


@torch.no_grad()
def features(vit, images, config, device, dtype=torch.float32, batch=256, workers=2):
    """Vectors of all images, (N, D) on the device; vit None: raw pixels, centred, and at most 32 x 32 of them."""
    out, done = None, 0
    for imgs in stream(images, in_order(images, batch), device, workers):
        x = prepare(imgs, config["img_size"], config["mean"], config["std"])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            small = lambda x: F.adaptive_avg_pool2d(x, [min(32, s) for s in x.shape[-2:]]).flatten(1)
            found = small(x) if vit is None else vit.encode(x, config["feature"]).float()
        if out is None:  # in one piece: parts would lie among activations and keep their memory from being given back
            out = found.new_empty(len(images), found.shape[1])
        out[done : done + len(found)] = found
        done += len(found)
    return out


def every(x):
    """A tensor of each process, all of one shape: a list."""
    if not dist.is_initialized():
        return [x]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def shared_features(vit, images, *how):
    """features(vit, images, *how), each process encoding every world-th image; all get all rows, in order."""
    if not dist.is_initialized():
        return features(vit, images, *how)
    rank, world, n = dist.get_rank(), dist.get_world_size(), len(images)
    rows = features(vit, images.pick(range(rank, n, world)), *how)
    rows = torch.cat([rows, rows[:1].expand(-(-n // world) - len(rows), -1)])
    return torch.stack(every(rows), dim=1).flatten(0, 1)[:n]


class Run:
    """A training run's folder, `args.out`: last.pt, log.jsonl, pictures; one process at a time; resumed if there.

    The lock is the system's and goes with the process, however that ends. Ctrl-C and SIGTERM set a flag, on which all
    processes agree; then they save and leave. Needs: begin() before the first step, steps() around the loop.
    """

    lock, handlers = None, {}  # the open lock file of this process, and the signal handlers from before
    free = ("steps", "workers", "out", "attention", "log_every")  # may change when a run goes on

    def __init__(self, args, rank, world):
        self.args, self.rank, self.world, self.out, self.signal = args, rank, world, Path(args.out), 0
        Run.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        if rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                Run.lock = open(self.out / ".lock", "a")  # noqa: SIM115 - held until main returns or the process ends
            except OSError as e:
                raise InputError(f"--out {args.out} cannot be written ({e})") from None
            try:
                if os.name == "nt":
                    import msvcrt

                    msvcrt.locking(self.lock.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another run is writing to {args.out}: wait for it, or give another --out") from None

    @staticmethod
    def leave_behind():
        """At the end of main: gives the lock, the signals and the process group back."""
        if Run.lock:
            Run.lock.close()
        while Run.handlers:
            signal.signal(*Run.handlers.popitem())
        if dist.is_initialized():
            dist.destroy_process_group()

    def on_signal(self, number, _):
        if self.signal:  # a second Ctrl-C: at once
            raise SystemExit(128 + number)
        self.signal = number

    def begin(self, parts, vit, config, train, test, device):
        """Resumes `parts` (modules, tensors, anything with a state_dict) from last.pt if there is one.

        vit, config: the network that evaluation uses, and what load_encoder needs to rebuild it. Writes the log's first
        line: options. Sets first (step), stop, total and steps_per_epoch.
        """
        args = self.args
        self.parts, self.vit, self.config, self.device = parts, vit, config, device
        self.steps_per_epoch = len(train) // args.batch
        self.total = args.epochs * self.steps_per_epoch
        self.stop = min(self.total, args.steps or self.total)
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.sets = (train.subset(10_000), test.subset(2_000)) if test is not None else None
        self.sample = torch.stack([train[i, 0.5] for i in spaced(len(train), 4)]).to(device)
        self.first, self.untrained = self.resume(), None
        if self.first == 0 and self.rank == 0:  # of a run that was killed before it saved
            (self.out / "log.jsonl").unlink(missing_ok=True)
        self.row = {k: v for r in (self.rows() if self.rank == 0 else ()) for k, v in r.items()}
        self.before = self.row.get("seconds", 0.0)
        self.say(
            f"{config['method']}: {len(train)} images of {args.canvas} px, {args.size}/{args.patch}, "
            f"{args.epochs} epochs of {self.steps_per_epoch} steps of {args.batch}, {device.type}, {args.precision}, "
            f"{self.world} process{'es' * (self.world > 1)} -> {self.out}"
        )
        if self.first:
            self.say(f"goes on from step {self.first} of {self.stop}")
        elif self.rank == 0:
            self.write(dict(args=vars(args), images=len(train)))
            self.untrained = copy.deepcopy(vit) if self.sets else None  # measured once the first step has shown itself
            if not self.sets:
                self.say("no labels: no k-NN")
        self.started = self.since = self.saved = time.perf_counter()
        self.waited, self.counted, self.leave, self.warned = 0.0, self.first, False, False
        self.bar = tqdm(total=self.stop, initial=self.first, unit="step", disable=True if self.rank else None)

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def resume(self):
        file = self.out / "last.pt"
        if not file.exists():
            return 0
        state = load_checkpoint(file)
        if not isinstance(state, dict) or "options" not in state:
            raise InputError(f"{file} is not a checkpoint of a run: remove it or give another --out")
        old, new = state["options"], vars(self.args)
        differ = [k for k in {**old, **new} if k not in self.free and old.get(k) != new.get(k)]
        if differ:
            what = ", ".join(f"--{k.replace('_', '-')} {old.get(k)} (now {new.get(k)})" for k in differ[:4])
            raise InputError(
                f"{self.out} holds a run with {what}: give another --out, or --init {file} to start from it"
            )
        for name, part in self.parts.items():
            restore(part, state[name])
        if self.rank == 0:  # what came after the checkpoint will be written again
            text = "".join(json.dumps(r) + "\n" for r in self.rows() if r.get("step", 0) <= state["step"])
            (self.out / "log.part").write_text(text)
            os.replace(self.out / "log.part", self.out / "log.jsonl")
        return state["step"]

    def rows(self):
        """The log so far, one dict a line; a last line that a kill cut short is left out."""
        file, rows = self.out / "log.jsonl", []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def write(self, row):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")

    def knn(self, vit):
        """k-NN accuracy, percent (k = 20, T = 0.07): at most 2,000 test images among 10,000. vit None: raw pixels."""
        training = vit is not None and vit.training
        if training:
            vit.eval()
        (a, b), (la, lb) = zip(
            *(
                (features(vit, s, self.config, self.device, self.dtype, workers=self.args.workers), s.labels)
                for s in self.sets
            ),
            strict=True,
        )
        if training:
            vit.train()
        return knn(a, la.to(self.device), b, lb.to(self.device))[20][0]

    def yardsticks(self):
        """k-NN of raw pixels and of the network as it was before the first step; their time is not the run's."""
        if self.untrained is None:
            return
        start = time.perf_counter()
        marks = dict(knn_pixels=self.knn(None), knn_untrained=self.knn(self.untrained))
        self.untrained = None
        self.say("k-NN before training: " + ", ".join(f"{k[4:]} {v:.1f} %" for k, v in marks.items()))
        self.write(marks)
        self.row.update(marks)
        took = time.perf_counter() - start
        self.started, self.since, self.saved = self.started + took, self.since + took, self.saved + took

    def steps(self, loader):
        """Yields (step, images) and notes how long it waited for them.

        Asked to stop, it says so before the step (self.leave), so that log_due and save_due agree, and leaves after it.
        """
        loader = iter(loader)
        for step in range(self.first, self.stop):
            start = time.perf_counter()
            imgs = next(loader)
            self.waited += time.perf_counter() - start
            self.leave = self.agreed(step)
            torch.manual_seed(((self.args.seed * 1_000_003 + step) * self.world + self.rank) % 2**63)  # for drop path
            yield step, imgs
            self.bar.update()
            if self.leave and step + 1 < self.stop:
                self.bar.close()
                self.say(f"stopped at step {step + 1} of {self.stop}, saved: the same command goes on from there")
                raise SystemExit(128 + self.leave)

    def agreed(self, step):
        """The signal to stop for, or 0: with several processes that of any of them, asked for every tenth step."""
        if self.world == 1 or step % 10 != 9:
            return self.signal if self.world == 1 else 0
        flag = torch.tensor(float(self.signal), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    def log_due(self, step):
        return step == self.first or (step + 1) % self.args.log_every == 0 or step + 1 == self.stop or self.leave

    def log(self, step, row, skipped, warning=None):
        """Adds what every run logs to `row`, writes it. skipped: non-finite gradients, in all and in a row."""
        now = time.perf_counter()
        images, seconds = (step + 1 - self.counted) * self.args.batch, now - self.since
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        else:
            memory = peak_memory()
        row = dict(step=step + 1, epoch=round((step + 1) / self.steps_per_epoch, 3), **row, skipped=int(skipped[0]))
        row |= dict(
            images_per_s=round(images / seconds, 1), data_wait=round(self.waited / seconds, 4), memory_mib=round(memory)
        )
        row |= dict(seconds=round(self.before + now - self.started, 2))
        row = {k: (v if math.isfinite(v) else None) if isinstance(v, float) else v for k, v in row.items()}
        self.write(row)
        self.since, self.waited, self.counted = now, 0.0, step + 1
        show = " ".join(
            f"{k} {v:.4g}" for k, v in row.items() if k in ("loss", "entropy", "images_per_s", "lr") and v is not None
        )
        if step == self.first:
            self.say(f"step {step + 1}: {show}")
            self.yardsticks()
        elif step - self.first < 2 * self.args.log_every:
            left = (self.stop - step) * self.args.batch / images * seconds / 60
            self.say(f"step {step + 1}: {show}, about {left:.1f} minutes to go")
        self.bar.set_postfix_str(show + (f" knn {self.row['knn']:.1f}" if "knn" in self.row else ""))
        if warning and not self.warned:
            self.say(f"warning at step {step + 1}: {warning}")
            self.warned = True
        if skipped[1] >= 20:
            raise SystemExit(
                f"stopped: {int(skipped[1])} non-finite gradients in a row, step {step + 1}, {row}; try a lower --lr"
            )

    def save_due(self, step):
        """At each epoch's end, at least every 5 minutes, at the end, and when asked to stop."""
        over = (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.stop
        return over or self.leave or time.perf_counter() - self.saved > 300

    def save(self, step):
        """Writes last.pt; measures k-NN if its turn has come."""
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        if self.rank == 0:
            if self.sets and (step + 1 == self.stop or rest == 0 and epoch % self.args.knn_every == 0):
                start = time.perf_counter()
                row = dict(
                    step=step + 1, epoch=round((step + 1) / self.steps_per_epoch, 3), knn=round(self.knn(self.vit), 2)
                )
                self.row.update(row)
                self.write(row)
                self.say(f"epoch {row['epoch']:g}: k-NN {row['knn']:.1f} %")
                self.draw_curve()
                self.since += time.perf_counter() - start
            state = {k: state_of(p) for k, p in self.parts.items()}
            state.update(step=step + 1, encoder=self.vit.state_dict(), config=self.config, options=vars(self.args))
            save_checkpoint(self.out / "last.pt", state)
        self.saved = time.perf_counter()

    def draw_curve(self):
        """curve.png: the loss, and k-NN accuracy beside its two yardsticks, over epochs."""
        from matplotlib.figure import Figure  # takes half a second, and no display

        rows, figure = self.rows(), Figure((8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, key in ((left, "loss"), (right, "knn")):
            axes.plot(*zip(*((r["epoch"], r[key]) for r in rows if r.get(key) is not None), strict=True))
            axes.set(xlabel="epoch", title=dict(loss="loss", knn="k-NN accuracy, % (k = 20)")[key])
        for key, style, label in (("knn_pixels", ":", "raw pixels"), ("knn_untrained", "--", "untrained")):
            if key in self.row:  # a checkpoint that was moved without its log has none
                right.axhline(self.row[key], color="grey", linestyle=style, label=label)
        right.legend()
        figure.savefig(self.out / "curve.png", dpi=100)

    def finish(self):
        """Prints and returns the result of a run that has reached its end."""
        self.bar.close()
        rows = self.rows() if self.rank == 0 else []
        result = {
            k: r[k] for r in rows for k in ("knn_pixels", "knn_untrained", "step", "loss", "knn", "seconds") if k in r
        }
        result["checkpoint"] = str(self.out / "last.pt")
        self.say(json.dumps(result))
        return result


def peak_memory():
    """Peak resident memory of this process, MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
