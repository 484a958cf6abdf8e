"""Two hosts that lose each other: two network namespaces joined by a veth pair, torchrun in each.

They share a file system, as the hosts of a cluster do. When the link is cut nothing says so, no
packet comes back: each side must notice by itself, say it in one line, and leave. Needs root and
``ip``; all traffic stays inside the two namespaces, which have no other link. Bound: after the
link is back the run ends bitwise as one that was never cut.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.integration.small_run import differing, final_tensors, write_corpus
from tests.parallel.torchrun import ENTRY, steps_of, wait_for_line, words
from train.config.schema import RunConfig

STEPS, TIMEOUT = 10, 20.0
PORT = 29511


def ip(*args):
    return subprocess.run(["ip", *args], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two namespaces with one link between them."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = [f"host{n}-{os.getpid()}" for n in (0, 1)]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire",
           "netns", names[1])  # fmt: skip
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(hosts, args, log):
    """One torchrun on each host, one rank each; both print to a file of their own."""
    jobs = []
    for number, name in enumerate(hosts):
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number),
            "--master-addr", "10.77.0.1", "--master-port", str(PORT), str(ENTRY), *args,
        ]  # fmt: skip
        with log(number).open("w") as file:
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
            jobs.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
    return jobs


def end(jobs, seconds):
    """Exit codes; what does not leave in time is killed and fails."""
    deadline = time.monotonic() + seconds
    try:
        return [job.wait(max(0.1, deadline - time.monotonic())) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_cut_link_ends_the_job_and_the_run_goes_on_when_it_is_back(hosts, tmp_path):
    corpus = write_corpus(tmp_path)
    args = [*words(corpus, STEPS), f"parallel.timeout_seconds={TIMEOUT}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def log(number):
        return tmp_path / f"host{number}.log"

    def both():
        return "\n".join(log(number).read_text()[-3000:] for number in (0, 1))

    codes = end(start(hosts, [*args, f"run_dir={whole}"], log), 1200)
    assert codes == [0, 0], both()

    jobs = start(hosts, [*args, f"run_dir={cut}"], log)
    try:
        wait_for_line(cut / "metrics.jsonl", 3, [jobs[0]], log(0), seconds=600)
        ip("-n", hosts[0], "link", "set", "wire", "down")
        began = time.monotonic()
    except BaseException:
        for job in jobs:
            job.kill()
        raise
    codes = end(jobs, 300)
    seconds = time.monotonic() - began
    print(f"cut: exit codes {codes} after {seconds:.1f} s, timeout {TIMEOUT} s")  # noqa: T201
    assert codes == [1, 1], both()
    for rank in (0, 1):
        told = [line for line in log(rank).read_text().splitlines() if line.startswith("error:")]
        assert len(told) == 1, both()
        assert f"rank {rank}: another rank is gone, or did not answer within" in told[0]
        print(told[0])  # noqa: T201
    done = len(steps_of(cut))
    assert 3 <= done < STEPS

    ip("-n", hosts[0], "link", "set", "wire", "up")
    codes = end(start(hosts, [*args, f"run_dir={cut}"], log), 600)
    assert codes == [0, 0], both()
    assert "resuming after step" in log(0).read_text()
    assert steps_of(cut) == steps_of(whole)
    mine, theirs = (final_tensors(RunConfig(run_dir=str(folder))) for folder in (cut, whole))
    assert differing(mine, theirs) == []
