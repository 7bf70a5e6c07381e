"""Draws demo.npz: 32 px images to try self-supervised learning on in minutes. `python tools/make_demo.py demo.npz`

An image is a quilt of four pieces of one of ten textures, the class, under two copies of one of eight shapes, the
second label. Each piece has its own turn, period and phase, and each shape its own place, turn, size and lightness: so
class and shape are all that two crops of an image have in common, comparing pixels finds neither, and a hidden patch
can be guessed from its neighbours. Colours are the same in all images: were they random for each image, a contrastive
method would learn the colours and nothing else.

Arrays (train_ and test_ each): images uint8 (N, 32, 32, 3), labels (the texture), shapes, masks (N, 128) bit-packed.
"""

import sys

import numpy as np

TEXTURES = ("stripes", "checks", "dots", "waves", "zigzag", "bricks", "rings", "crosses", "grain", "blobs")
SHAPES = ("disc", "ring", "square", "triangle", "plus", "crescent", "bars", "star")
SIDE, FINE = 32, 2  # drawn at FINE times the size, then averaged


def turned(x, y, t):
    return np.cos(t) * x + np.sin(t) * y, np.cos(t) * y - np.sin(t) * x


def texture(kind, x, y, rng):
    """Two tones, -1 and 1, over coordinates in px, with a random turn, period and phase."""
    u, v = turned(x, y, rng.uniform(0, 2 * np.pi))
    period = rng.uniform(5, 8)
    u, v = (2 * np.pi / period * t + rng.uniform(0, 2 * np.pi) for t in (u, v))
    near_u, near_v = (abs((t / (2 * np.pi)) % 1 - 0.5) for t in (u, v))  # 0 in the middle of a cell, 0.5 at its border
    if kind == "stripes":
        light = np.sin(u)
    elif kind == "checks":
        light = np.sin(u) * np.sin(v)
    elif kind == "dots":
        light = 0.4 - np.hypot(near_u, near_v)
    elif kind == "waves":
        light = np.sin(u + 2 * np.sin(v))
    elif kind == "zigzag":
        light = np.sin(u + 6 * near_v * 2)
    elif kind == "bricks":
        row = np.floor(v / (2 * np.pi))
        light = np.minimum(abs((u / (4 * np.pi) + row / 2) % 1 - 0.5) * 2 - 0.12, 0.36 - near_v)
    elif kind == "rings":
        light = np.sin(2 * np.pi * 2.5 * np.hypot(near_u, near_v))
    elif kind == "crosses":
        light = 0.14 - np.minimum(near_u, near_v)
    else:
        cells = rng.standard_normal((16, 16))
        if kind == "blobs":
            fine = np.kron(cells, np.ones((4, 4)))
            light = sum(np.roll(fine, (i, j), (0, 1)) for i in range(-4, 5) for j in range(-4, 5))
        else:
            light = np.kron(cells, np.ones((4, 4)))
    return np.where(light > np.median(light), 1.0, -1.0)


def inside(shape, x, y):
    """Whether points lie in a shape of radius 1 around the origin."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    if shape == "disc":
        return r < 0.85
    if shape == "ring":
        return (r < 1) & (r > 0.55)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.75
    if shape == "triangle":
        return (y > -0.5) & (y < 1 - 1.732 * abs(x))
    if shape == "plus":
        return (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 1)
    if shape == "crescent":
        return (r < 1) & (np.hypot(x - 0.55, y) > 0.8)
    if shape == "bars":
        return (abs(x) < 0.9) & (abs(abs(y) - 0.5) < 0.25)
    return r < 0.65 + 0.35 * np.cos(5 * angle)  # star


def draw(kind, shape, rng):
    """One image (32, 32, 3) uint8 and the mask of its shapes (32, 32) bool."""
    n = SIDE * FINE
    y, x = (np.mgrid[:n, :n] + 0.5) / FINE
    quarter = (x > rng.uniform(11, 21)) + 2 * (y > rng.uniform(11, 21))
    light = 0.36 + 0.2 * np.choose(quarter, [texture(kind, x, y, rng) for _ in range(4)])
    mask, places = np.zeros((n, n)), []
    for _ in range(12):
        cy, cx, radius = *rng.uniform(3, SIDE - 3, 2), rng.uniform(4.5, 6)
        if len(places) < 2 and all(np.hypot(cy - py, cx - px) > radius + pr for py, px, pr in places):
            places.append((cy, cx, radius))
            hit = inside(shape, *turned((x - cx) / radius, (y - cy) / radius, rng.uniform(0, 2 * np.pi)))
            light[hit], mask[hit] = rng.uniform(0.65, 0.9), 1
    light, mask = (t.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3)) for t in (light, mask))
    light, mask = np.round(light[..., None] * 15) / 15, mask > 0.5  # few levels: the file stays small
    rgb = np.where(mask[..., None], light * [1.1, 0.95, 0.55], light * [0.7, 0.95, 1.3])
    return (np.clip(rgb, 0, 1) * 255).round().astype(np.uint8), mask


def make(n_train=4000, n_test=800, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", n_train), ("test", n_test)):
        pairs = [(i % len(TEXTURES), i // len(TEXTURES) % len(SHAPES)) for i in range(n)]
        rng.shuffle(pairs)
        drawn = [draw(TEXTURES[t], SHAPES[s], rng) for t, s in pairs]
        arrays[f"{split}_images"] = np.stack([d[0] for d in drawn])
        arrays[f"{split}_labels"], arrays[f"{split}_shapes"] = np.array(pairs, np.uint8).T
        arrays[f"{split}_masks"] = np.packbits(np.stack([d[1] for d in drawn]).reshape(n, -1), axis=1)
    return arrays


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **make())
