"""What holds for all scripts: parts can be copied alone, files stay readable, options and docs are true."""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex

import pytest
import torch
from conftest import MAIN, ROOT, encoder
from PIL import Image

import dino
import vit

FILES = sorted(ROOT.glob("*.py"))
METHODS = [ROOT / f for f in ("dino.py", "mae_pcae.py", "siameseim.py")]


def top_level(file):
    return [n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def depth(node, level=0):
    inner = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.FunctionDef, ast.ClassDef)
    rest = getattr(node, "orelse", [])
    elif_ = rest if isinstance(node, ast.If) and len(rest) == 1 and isinstance(rest[0], ast.If) else []
    deeper = lambda child: isinstance(child, inner) and child not in elif_
    return max([level, *(depth(child, level + deeper(child)) for child in ast.iter_child_nodes(node))])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_files_stay_readable(file):
    text = file.read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert depth(ast.parse(text)) <= 5
    assert all(ast.get_docstring(n) or len(n.body) < 12 for n in top_level(file) if n.name != "main")


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f.name)
def test_a_method_imports_vit_alone(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))  # also those inside of functions
    imports = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    imports |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    assert imports & {f.stem for f in FILES} == {"vit"}


def section(number):
    return re.split(r"^# \d [a-z ]+ -{20,}$", (ROOT / "vit.py").read_text(), flags=re.M)[number]


def run_alone(*code):
    """Runs code with the imports that the docstring of vit.py names, and nothing else of ours."""
    scope = {"__name__": "copied"}
    imports = "import math, torch; import torch.nn.functional as F; from einops import rearrange; from torch import nn"
    exec("\n".join([imports, *code]), scope)
    return scope


def test_the_network_can_be_copied_alone():
    """Section 1 of vit.py gives the same numbers and refuses the same input."""
    alone, x = run_alone(section(1)), torch.randn(2, 3, 16, 24)
    for pos in ("learned", "sincos"):
        nets = []
        for make in (alone["ViT"], vit.ViT):
            torch.manual_seed(0)
            nets.append(make(16, 4, pos=pos, **vit.SIZES["test"]).eval())
        assert torch.equal(*(net(x) for net in nets)) and torch.equal(*(net.cls(x) for net in nets))
    for wrong in (dict(img_size=15), dict(heads=3), dict(dim=6, heads=1, pos="sincos")):
        with pytest.raises(alone["InputError"]):
            alone["ViT"](**dict(img_size=16, patch=4, dim=32, depth=1, heads=2) | wrong)


def test_dino_s_views_head_and_loss_can_be_copied_alone():
    """The views with section 3 of vit.py, the head and the loss with nothing."""
    views = run_alone(section(3), *map(inspect.getsource, (dino.sample_views, dino.augment)))
    how = (4, 2, 16, (8, 8), (0.4, 1.0), [1.0, 0.1], [0.0, 0.2], 1.0)
    generator = lambda: torch.Generator().manual_seed(3)
    imgs = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    crops = lambda m: m["augment"](imgs, m["sample_views"](*how, generator()), (8, 8), 0.1, 0.5, 0.2)
    assert torch.equal(crops(views), crops(vars(dino)))
    alone = run_alone(*map(inspect.getsource, (dino.DINOHead, dino.dino_loss)))
    torch.manual_seed(0)
    out = alone["DINOHead"](8, 16)(torch.randn(10, 8)).unflatten(0, (5, 2))
    loss = lambda m: m["dino_loss"](out, out[:2], torch.zeros(16))[0]
    assert torch.equal(loss(alone), loss(vars(dino)))


def commands(text):
    return [line.split("  #")[0] for line in re.findall(r"^ *((?:python|torchrun \S+) \w+\.py.*)", text, re.M)]


def understood(command, npz):
    """Raises SystemExit where a script does not know an option of a command."""
    words = shlex.split(command.split(";")[-1])
    script = next(w for w in words if w.endswith(".py"))
    if "--help" in words:
        return
    argv = [npz if w in ("photos/", "imagenet/") else w for w in words[words.index(script) + 1 :]]
    module = importlib.import_module(script[:-3])
    if script == "bench.py":
        rows = argv[1 : next((i for i, w in enumerate(argv) if w.startswith("--") and i), None)] or ["dino"]
        for row in rows:
            module.run_args(row, [w for w in argv if w not in rows and w != "--rows"])
    else:
        vit.options("", module.OPTIONS, argv)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_commands_in_docstrings_are_understood(file, npz):
    for command in commands(importlib.import_module(file.stem).__doc__):
        understood(command, npz)


def test_commands_in_the_readme_are_understood(npz):
    found = commands((ROOT / "README.md").read_text())
    assert len(found) >= 3
    for command in found:
        understood(command, npz)


def test_the_snippet_in_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    for folder in ("weights", "examples/images"):
        os.makedirs(folder)
    encoder("weights/dino-nano4-cifar10.pt")
    Image.radial_gradient("L").save("examples/images/0.jpg")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([1, 32])" in out.getvalue()


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in ("vit", "hubconf")], ids=lambda f: f.name)
def test_help_needs_no_network_and_no_data(file, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(file.stem).main(["--help"])
    assert stop.value.code == 0 and "options:" in capsys.readouterr().out


TABLES = [importlib.import_module(f.stem).OPTIONS for f in FILES if f.stem not in ("vit", "bench", "draw", "hubconf")]
OWN_MEANING = {"out", "drop_path", "momentum", "clip", "weight_decay", "crop_scale", "mask_ratio", "epochs", "batch"}
OWN_MEANING |= {"checkpoint", "data", "train", "lr", "limit", "seed", "img_size", "decoder_dim", "decoder_heads"}
OWN_MEANING |= {"precision", "labels", "test", "results"}


def test_options_of_one_name_have_one_meaning():
    """Where two scripts have an option of one name, its help is the same; OWN_MEANING lists those that say more."""
    seen = {}
    for table in TABLES:
        for name, (_, text, *_) in table.items():
            seen.setdefault(name, set()).add(text)
    assert {name for name, texts in seen.items() if len(texts) > 1} <= OWN_MEANING
    assert sum(len(t) for t in TABLES) > 150


def test_no_script_has_too_many_options():
    assert len(dino.OPTIONS) <= 36


@pytest.mark.parametrize("method", ["dino", *(pytest.param(m, marks=pytest.mark.slow) for m in list(MAIN)[1:])])
def test_bench_measures_a_small_step(method, capsys):
    import bench

    options = ["--size", "test", "--patch", "8", "--batch", "4", "--precision", "fp32", "--steps", "1", "--turns", "1"]
    heads = "--prototypes 64 --hidden 32 --local-crops 2"
    decoder = "--decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
    own = dict(dino=heads, siameseim="--decoder-dim 16 --decoder-heads 2", hybrid=f"{heads} {decoder}")
    row = f"{method} {own.get(method, decoder)}"
    result = bench.main(["--rows", row, row + " --seed 1", *options])["rows"]
    first, last = result.values()
    assert first["images_per_s"] > 0 and 0 < first["gmacs"] < 1 and 0 < first["mfu"] < 1
    assert first["speed"] == pytest.approx(first["images_per_s"] / last["images_per_s"], rel=1e-3)
    assert first["phases_ms"].keys() == set(bench.PHASES)
    busy = {k for k, v in first["phases_ms"].items() if v > 0}
    assert busy >= {"data", "augment", "forward", "backward", "optimiser"}, "a phase's function is called otherwise now"
    assert ("ema" in busy) == (method != "mae")


def test_tests_that_the_docs_name_are_there():
    text = "".join((ROOT / f).read_text() for f in ("docs/users.md", "CONTRIBUTING.md"))
    here = "".join(f.read_text() for f in (ROOT / "tests").glob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 25 and all(f"def {name}(" in here for name in named)
    assert all((ROOT / "tests" / name).exists() for name in re.findall(r"`(test_\w+\.py)`", text))
