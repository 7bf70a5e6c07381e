"""The notebook runs from top to bottom, and its committed outputs are there and small."""

import json
import shutil

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other tests more threads would wait for each other
    import nbclient
    import nbformat

    for file in [*ROOT.glob("*.py"), ROOT / "demo.npz", ROOT / "weights"]:
        (shutil.copytree if file.is_dir() else shutil.copy)(file, file.name)
    notebook = nbformat.read(ROOT / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600).execute()  # raises where a cell does
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])) >= 9
    cells = json.loads((ROOT / "tour.ipynb").read_text())["cells"]
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 9 and (ROOT / "tour.ipynb").stat().st_size < 1.5e6  # those that are committed
