"""What holds for all scripts: copies are identical, options mean the same, files stay readable, docs are true."""

import ast
import collections
import contextlib
import io
import re
import shlex

import pytest
from conftest import ROOT

FILES = sorted(ROOT.glob("*.py"))
METHODS = [f for f in FILES if "train_step" in f.read_text() and f.stem not in ("bench", "hybrid")]


def top_level(file):
    return [n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def test_copies_are_identical():
    seen = collections.defaultdict(dict)
    for file in FILES:
        for node in top_level(file):
            if node.name not in ("main", "get_args", "train_step"):
                seen[node.name][file.name] = ast.get_source_segment(file.read_text(), node)
    for name, copies in seen.items():
        assert len(set(copies.values())) == 1, f"{name} differs between {' and '.join(copies)}"


def depth(node, level=0):
    inner = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)
    branch = (
        node.orelse if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If) else []
    )
    return max(
        [level] + [depth(c, level + (isinstance(c, inner) and c not in branch)) for c in ast.iter_child_nodes(node)]
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_files_stay_readable(file):
    text = file.read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert depth(ast.parse(text)) <= 5
    assert all(
        ast.get_docstring(n) or n.name[0] == "_" or len(n.body) < 12
        for n in top_level(file)
        if n.name not in ("main", "get_args")
    )


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f.name)
def test_at_least_half_of_a_method_is_the_method(file):
    """Options, views, model, loss, step and pictures against main and what is the same everywhere."""
    lines = file.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"# -+ main", line))
    assert start > len(lines) / 2
    imports = {n.module for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)}
    assert imports & {f.stem for f in FILES} == {"vit"}


def commands(text):
    return [
        line.strip().split("  #")[0]
        for line in text.splitlines()
        if re.match(r"\s*(python|torchrun \S+) \w+\.py", line)
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_commands_in_docstrings_are_understood(file, npz):
    import importlib

    module = importlib.import_module(file.stem)
    for command in commands(module.__doc__):
        words = shlex.split(command.split(";")[-1])
        script = next(w for w in words if w.endswith(".py"))
        options = words[words.index(script) + 1 :]
        options = [npz if w in ("photos/", "imagenet/") else w for w in options]
        importlib.import_module(script[:-3]).get_args(options)


def test_commands_in_the_readme_are_understood(npz):
    import importlib

    found = commands((ROOT / "README.md").read_text())
    assert len(found) >= 3
    for command in found:
        words = shlex.split(command)
        script = next(w for w in words if w.endswith(".py"))
        options = [npz if w in ("photos/", "my_photos/") else w for w in words[words.index(script) + 1 :]]
        if script.startswith("tests/"):
            continue
        importlib.import_module(script[:-3]).get_args(options)


def test_the_snippet_in_the_readme_runs(tmp_path):
    import os

    from PIL import Image

    from vit import SIZES, ViT

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    vit = ViT(32, 4, **SIZES["test"])
    import torch

    os.makedirs("runs/dino-demo")
    config = dict(vit.config, mean=[0.5] * 3, std=[0.2] * 3, feature="cls")
    torch.save(dict(encoder=vit.state_dict(), config=config), "runs/dino-demo/last.pt")
    Image.radial_gradient("L").save("cat.jpg")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([1, 32])" in out.getvalue()


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "vit"], ids=lambda f: f.name)
def test_help_needs_no_network_and_no_data(file, capsys):
    import importlib

    with pytest.raises(SystemExit) as stop:
        importlib.import_module(file.stem).main(["--help"])
    assert stop.value.code == 0 and "options:" in capsys.readouterr().out


def test_options_of_one_name_have_one_meaning():
    seen = collections.defaultdict(dict)
    for file in FILES:
        for name, text in re.findall(r'add\("(--[\w-]+)".*?help="(.*?)"\)', file.read_text()):
            seen[name][file.name] = text.removeprefix("* ")
    shared = {
        n: set(t.values())
        for n, t in seen.items()
        if len(t) > 1
        and n not in ("--data", "--out", "--img-size", "--precision", "--size", "--steps", "--batch", "--patch")
    }
    assert all(len(t) == 1 for t in shared.values()), {n: t for n, t in shared.items() if len(t) > 1}


@pytest.mark.parametrize(
    "method", ["dino", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mae", "pcae", "siameseim", "hybrid"))]
)
def test_bench_measures_a_small_step(method, capsys):
    import bench

    options = ["--size", "test", "--patch", "8", "--batch", "4", "--precision", "fp32", "--steps", "1", "--turns", "1"]
    heads = "--prototypes 64 --hidden 32 --local-crops 2"
    decoder = "--decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
    own = dict(dino=heads, siameseim="--decoder-dim 16 --decoder-heads 2", hybrid=f"{heads} {decoder}")
    row = f"{method} {own.get(method, decoder)}"
    result = bench.main(["--rows", row, *options])["rows"][row]
    assert result["images_per_s"] > 0 and result["speed"] == pytest.approx(1) and 0 < result["gmacs"] < 1
    assert set(result["phases_ms"]) == {"data", "augment", "forward", "backward", "optimiser", "ema"}
    busy = {k for k, v in result["phases_ms"].items() if v > 0}
    assert busy >= {"data", "augment", "forward", "backward", "optimiser"}, "a phase's function is called otherwise now"
    assert ("ema" in busy) == (method != "mae") and 0 < result["mfu"] < 1
