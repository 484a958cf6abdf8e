"""The cluster guide's Slurm command, with doubles of Slurm's programs on one machine.

``sbatch`` sets the variables of a job and starts its script, ``srun`` runs a command once for each
node, ``scontrol`` names the nodes and notes what is put back into the queue. For the script's own
part torchrun is a double too; in the slow test it is the real one, and two nodes train together.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.integration.small_run import differing, final_tensors, write_corpus
from tests.parallel.torchrun import words
from train.config.schema import RunConfig

DOUBLES = {
    "sbatch": """
import os, sys
words = sys.argv[1:]
assert words[0] == "--nodes", words
assert "#SBATCH --signal=B:TERM@300" in open(words[2]).read().splitlines()
job = {"SLURM_JOB_ID": os.environ.get("TEST_JOB", "4711"), "SLURM_NNODES": words[1],
       "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "1"}
os.execvpe("bash", ["bash", *words[2:]], {**os.environ, **job})
""",
    "srun": """
import os, signal, subprocess, sys
option, *words = sys.argv[1:]
assert option == "--kill-on-bad-exit=0", option
nodes = []
def forward(number, _):
    for node in nodes:
        node.send_signal(number)
signal.signal(signal.SIGTERM, forward)
for number in range(int(os.environ["SLURM_NNODES"])):
    nodes.append(subprocess.Popen(words, env={**os.environ, "SLURM_NODEID": str(number)}))
sys.exit(max(node.wait() for node in nodes))
""",
    "scontrol": """
import os, sys
if sys.argv[1] == "show":
    print("localhost")
else:
    with open(os.environ["TEST_NOTES"], "a") as notes:
        notes.write(" ".join(sys.argv[1:]) + chr(10))
""",
    "torchrun": """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with open(os.environ["TEST_NOTES"], "a") as notes:
    notes.write(json.dumps([os.environ["SLURM_NODEID"], *sys.argv[1:]]) + chr(10))
time.sleep(float(os.environ["TEST_SECONDS"]))
sys.exit(int(os.environ["TEST_CODE"]))
""",
}


@pytest.fixture
def slurm(tmp_path):
    """Environment in which the doubles stand first; torchrun is real unless it is named."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in DOUBLES.items():
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "TEST_NOTES": f"{tmp_path}/notes", "TEST_SECONDS": "0", "TEST_CODE": "0"}  # fmt: skip


def guide_command():
    text = (ROOT / "docs" / "guide" / "cluster.md").read_text()
    (line,) = re.findall(r"^sbatch .*$", text, re.MULTILINE)
    return shlex.split(line)


def notes_of(env):
    return Path(env["TEST_NOTES"]).read_text().splitlines()


def test_each_node_starts_one_launcher_that_meets_the_others(slurm):
    slurm["TEST_JOB"] = "54711"  # whose port is below those that Linux gives away
    command = guide_command()
    subprocess.run(command, cwd=ROOT, env=slurm, check=True, timeout=60)
    one, other = sorted(notes_of(slurm))
    assert one.replace('["0"', '["1"', 1) == other
    options = one.split('", "')
    for name, value in (("--nnodes", "2"), ("--nproc-per-node", "1"), ("--rdzv-id", "54711")):
        assert options[options.index(name) + 1] == value
    assert options[options.index("--rdzv-endpoint") + 1] == "localhost:24711"
    assert [w.strip('"]') for w in options[options.index("train/pretrain.py") + 1 :]] == command[4:]


@pytest.mark.parametrize("code", [0, 1])
def test_the_jobs_exit_code_is_the_launchers(code, slurm):
    slurm["TEST_CODE"] = str(code)
    done = subprocess.run(guide_command(), cwd=ROOT, env=slurm, check=False, timeout=60)
    assert done.returncode == code
    assert not any(line.startswith("requeue") for line in notes_of(slurm))


def test_the_end_of_the_slot_stops_the_launchers_and_puts_the_job_back(slurm):
    slurm["TEST_SECONDS"] = "60"
    job = subprocess.Popen(guide_command(), cwd=ROOT, env=slurm)
    until = time.monotonic() + 60
    while not os.path.exists(slurm["TEST_NOTES"]) or len(notes_of(slurm)) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 1
    assert notes_of(slurm)[2:] == ["requeue 4711"]


def is_free(port):
    with socket.socket() as ours:
        return ours.connect_ex(("localhost", port)) != 0


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one_do(slurm, tmp_path):
    (tmp_path / "bin" / "torchrun").unlink()
    some = os.getpid() % 19_000  # the rendezvous' port follows from the job's number
    slurm["TEST_JOB"] = str(next(job for job in range(some, 20_000) if is_free(10_000 + job)))
    given = [*words(write_corpus(tmp_path), 3), "parallel.ep=2"]
    both, one = tmp_path / "both", tmp_path / "one"
    path = f"{os.path.dirname(sys.executable)}:"
    slurm["PATH"] = slurm["PATH"].replace(":", f":{path}", 1)
    command = [*guide_command()[:4], *given, f"run_dir={both}"]
    subprocess.run(command, cwd=ROOT, env=slurm, check=True, timeout=400)
    alone = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*alone, "train/pretrain.py", *given, f"run_dir={one}"]
    subprocess.run(command, cwd=ROOT, env=slurm, check=True, timeout=400)
    mine, theirs = (final_tensors(RunConfig(run_dir=str(folder))) for folder in (both, one))
    assert differing(mine, theirs) == []
