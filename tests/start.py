"""`start.py SCRIPT OPTIONS` runs a script as a user does, but may save at any time; with IN_MEMORY=0 it streams."""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import vit  # noqa: E402

vit.SAVE_EVERY = 0
vit.IN_MEMORY = int(os.environ.get("IN_MEMORY", vit.IN_MEMORY))
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script; runpy does not
runpy.run_path(sys.argv[0], run_name="__main__")
