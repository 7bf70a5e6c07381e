"""Faults that cost time to provoke; longer: KILLS=50 SOAK=2000 python -m pytest -m slow tests/test_faults.py"""

import contextlib
import functools
import os
import random
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest

import vit
from conftest import (
    SCRIPT,
    checkpoint,
    command,
    encoder,
    environment,
    losses,
    same,
    spawn,
    start,
    tiny,
    training,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.linux]


def streamed(folder, *options, out="run", **more):
    """A DINO run whose two workers decode, as if the folder were too large for memory."""
    options = tiny("--epochs", 500, "--workers", 2, *options, data=folder, out=out)
    return spawn(command("dino.py", *options, quick=True), environment(IN_MEMORY="0"), **more)


def children(pid):
    """Processes started by `pid`, at any depth."""
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [c for p in found for c in children(p)]


def kill_all(process):
    """kill -9 of a process and all that it started; torchrun's workers are in sessions of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # it starts no more
        for pid in [*children(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)


KILLS = int(os.environ.get("KILLS", 3))


def kill_at_random_moments(name, argv, out="run"):
    """Importing, loading, training, saving: it is killed wherever it happens to be, and started again.

    Moments are between half and twice the time that a first start needs for its first save on this machine.
    """
    moments, resumed, started, process = random.Random(0), 0, time.time(), spawn(argv)
    wait_for(process, lambda: os.path.exists(f"{out}/last.pt"))
    ready = time.time() - started
    kill_all(process), process.communicate()
    for _ in range(KILLS):
        process = spawn(argv)
        time.sleep(moments.uniform(0.5 * ready, 2 * ready))
        kill_all(process)
        resumed += "resumes after step" in process.communicate()[0]
        assert process.returncode == -9
    print(f"{name}: {resumed} of {KILLS} runs had resumed when they were killed")
    assert resumed >= KILLS // 2


SEVERAL = [(m, n) for m in SCRIPT for n in (2, 3)] if KILLS > 3 else [("dino", 3), ("siameseim", 2)]


@pytest.mark.parametrize(
    "method,in_memory,processes",
    [*((m, vit.IN_MEMORY, 1) for m in SCRIPT), *((m, vit.IN_MEMORY, n) for m, n in SEVERAL), ("dino", 0, 1)],
)
def test_kill_9_at_random_moments(method, in_memory, processes, folder, monkeypatch):
    """The run ends with the weights of one left alone; also where two processes decode its images."""
    monkeypatch.setenv("IN_MEMORY", str(in_memory))
    many = dict(processes=processes)
    options = functools.partial(
        tiny, "--epochs", 5000, "--warmup", 1, "--drop-path", 0.1, "--workers", 2, data=folder, batch=12, method=method
    )
    kill_at_random_moments(f"{method}, {processes}", command(SCRIPT[method], *options(), quick=True, **many))
    last = checkpoint()["step"] + 10
    for out in ("run", "straight"):
        done = start(SCRIPT[method], *options("--steps", last, out=out), timeout=900, **many)
        assert done.returncode == 0, done.stderr[-2000:]
    assert same(checkpoint("straight"), checkpoint()) == []


def test_kill_9_while_fine_tuning(npz):
    start("dino.py", *tiny("--steps", 1))
    options = ["run/last.pt", "--epochs", 300 * KILLS, "--batch", 16, "--device", "cpu", "--out"]
    kill_at_random_moments("fine-tuning", command("evaluation/finetune.py", *options, "killed", quick=True), "killed")
    for out in ("killed", "straight"):
        done = start("evaluation/finetune.py", *options, out, timeout=9000)
        assert done.returncode == 0, done.stderr[-2000:]
    assert same(checkpoint("straight"), checkpoint("killed")) == []


def test_a_streamed_evaluation_names_a_file_that_cannot_be_read_and_leaves(folder):
    """Its workers, which leave signals to their parent, end too."""
    encoder("x.pt", data=folder)
    broken = Path(folder, "train/class1/001.png")
    broken.write_bytes(b"broken")
    argv = command("eval_knn.py", "x.pt", "--device", "cpu", "--k", "1", quick=True)
    done = subprocess.run(argv, env=environment(IN_MEMORY="0"), capture_output=True, text=True, timeout=60)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and f"{broken} is not a readable image" in line, done.stderr[-2000:]


def test_a_worker_that_dies_ends_the_run_which_then_resumes(folder):
    process = streamed(folder, stderr=subprocess.PIPE)
    wait_for(process)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    text = process.communicate(timeout=60)[1]
    assert process.returncode in (1, 2) and "DataLoader worker" in text, text  # 2: torch raised it within a save
    assert start("dino.py", *tiny("--epochs", 500, "--steps", 20, data=folder)).returncode == 0


def test_one_of_two_processes_dies(npz):
    process = spawn(command("dino.py", *tiny("--epochs", 500), processes=2))
    wait_for(process)
    trains = lambda pid: (file := Path(f"/proc/{pid}/cmdline")).exists() and b"dino.py" in file.read_bytes()
    ranks = [pid for pid in children(process.pid) if trains(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    text = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "SIGKILL" in text
    assert not any(map(trains, ranks))


def ranks_of(process):
    return [p for p in children(process.pid) if b"dino.py" in Path(f"/proc/{p}/cmdline").read_bytes()]


def test_torchrun_starts_again_after_a_killed_worker(npz):
    argv = command("dino.py", *tiny("--epochs", 40), processes=2, quick=True)
    argv.insert(argv.index("--standalone"), "--max-restarts=2")
    process = spawn(argv)
    wait_for(process, lambda: os.path.exists("run/last.pt"))
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumes after step" in text, text
    assert start("dino.py", *tiny("--epochs", 40, out="straight"), processes=2).returncode == 0
    assert same(checkpoint("straight"), checkpoint()) == []


def test_two_nodes_train_as_one(npz):
    """Two torchruns that meet at an address, as on two machines."""
    exact = ["--precision", "fp32", "--epochs", 5]
    where = ["--nnodes=2", "--master-addr=127.0.0.1", "--master-port=29511"]
    nodes = [
        spawn(
            command("dino.py", *tiny(*exact, out="nodes", batch=8), processes=2, torchrun=[*where, f"--node-rank={i}"])
        )
        for i in range(2)
    ]
    texts = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert "4 processes -> nodes" in texts[0]
    assert start("dino.py", *tiny(*exact, out="one", batch=8)).returncode == 0
    one, two = losses("one"), losses("nodes")
    assert max(abs(one[k] - two[k]) for k in one.keys() & two.keys()) < 1e-5


@pytest.mark.parametrize("method", SCRIPT)
def test_memory_is_flat_in_the_length_of_the_run(method, npz):
    """Resident memory at the end of SOAK steps (2,000 by hand, 400 here) is that of their first quarter, plus 3 %.

    Medians over a tenth of the run, as it comes and goes by 1 %. The first quarter does not count: the allocator's
    arenas fill in jumps of up to 2 % until k-NN and the curve have run a few times.
    """
    steps = int(os.environ.get("SOAK", 400))
    options, seen = tiny("--epochs", 500, "--steps", steps, method=method), {}
    process = spawn(command(SCRIPT[method], *options), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if training() and (step := max(losses())) not in seen:
            status = Path(f"/proc/{process.pid}/status").read_text()
            seen[step] = next((int(s.split()[1]) for s in status.splitlines() if s.startswith("VmRSS")), None)
        time.sleep(0.05)
    assert process.returncode == 0
    inside = lambda low, high: statistics.median(v for k, v in seen.items() if v and low * steps < k <= high * steps)
    print(method, {s: v and v // 1024 for s, v in seen.items()})
    assert inside(0.9, 1) < 1.03 * inside(0.25, 0.35), seen


def test_a_scheduler_that_stops_all_processes_at_once(folder):
    """SIGTERM to the whole group, workers too: the run saves and leaves."""
    process = streamed(folder, start_new_session=True)
    wait_for(process)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "run the same command again to resume" in text
    assert checkpoint()["step"] >= 1
