"""The launcher for two hosts: its command lines, with stubs that write down what they are asked; and, with privileges,
a job of two "hosts" that are network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_compression_links import needs_root

from descentlab.cluster.namespaces import Shape, network

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "containers" / "two-hosts"
STUB = """#!{python}
import json, os, sys
with open(os.environ["STUB_LOG"], "a") as log:
    own = [sys.argv[0].rpartition("/")[2], *sys.argv[1:]]
    named = dict(gloo=os.environ.get("GLOO_SOCKET_IFNAME"), nccl=os.environ.get("NCCL_SOCKET_IFNAME"))
    log.write(json.dumps([own, named]) + "\\n")
sys.exit(1 if sys.argv[1:3] == ["network", "inspect"] and os.environ.get("NO_NETWORK") else 0)
"""
JOB = {"NODE_RANK": "1", "MASTER_ADDR": "192.168.7.20"}
FIVE = {"PARENT_IF": "eno1", "SUBNET": "192.168.7.0/24", "GATEWAY": "192.168.7.1", "NET_NAME": "lab"}
FIVE |= {"CONTAINER_IP": "192.168.7.21"}


def asked(tmp_path: Path, *arguments: str, **variables: str) -> tuple[int, list, str]:
    """(exit code, what the stubs were asked, output) of the script."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "a folder").mkdir(exist_ok=True)  # a blank in the path: unquoted words would fall apart
    for name in ("docker", "python3"):
        stub = tmp_path / "bin" / name
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
    log = tmp_path / "log"
    log.write_text("")
    keep = {k: v for k, v in os.environ.items() if k not in {*JOB, *FIVE, "INTERFACE"}}
    environment = {**keep, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STUB_LOG": str(log), **variables}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=tmp_path / "a folder",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, [json.loads(line) for line in log.read_text().splitlines()], done.stdout + done.stderr


def torchrun(logs: str) -> list[str]:
    where = ["--nnodes=2", "--nproc-per-node=1", "--node-rank=1", "--master-addr=192.168.7.20", "--master-port=29500"]
    return ["-m", "torch.distributed.run", *where, f"--log-dir={logs}", "--redirects=3", "--tee=3"]


def test_run_names_the_interface_for_both_backends(tmp_path: Path) -> None:
    code, calls, text = asked(tmp_path, "run", "job.py", "--lr", "0.1", INTERFACE="lo", **JOB)
    assert code == 0, text
    assert calls == [[["python3", *torchrun("logs"), "job.py", "--lr", "0.1"], {"gloo": "lo", "nccl": "lo"}]]


@pytest.mark.parametrize("there", [True, False])
def test_a_container_has_its_five_parameters(tmp_path: Path, there: bool) -> None:
    """The network is made once, from four of them; the container gets the fifth as its address."""
    missing = {} if there else {"NO_NETWORK": "1"}
    code, calls, text = asked(tmp_path, "container", "job.py", GPUS="all", **JOB, **FIVE, **missing)
    assert code == 0, text
    words = [call[0] for call in calls]
    make = ["docker", "network", "create", "--driver", "macvlan", "--subnet", FIVE["SUBNET"], "--gateway"]
    make += [FIVE["GATEWAY"], "--opt", "parent=eno1", "lab"]
    assert words[0] == ["docker", "network", "inspect", "lab"] and (make in words) == (not there)
    run = words[-1]
    assert run[:2] == ["docker", "run"] and run[run.index("--network") + 1] == "lab"
    assert run[run.index("--ip") + 1] == "192.168.7.21" and run[run.index("--gpus") + 1] == "all"
    assert f"{tmp_path / 'a folder'}:/lab/files:ro" in run and f"{tmp_path / 'a folder' / 'logs'}:/lab/logs" in run
    assert {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} <= set(run)
    image = run.index("descentlab:cpu")
    assert run[image - 2 : image] == ["--entrypoint", "python3"]
    assert run[image + 1 :] == [*torchrun("/lab/logs"), "job.py"]


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["run", "job.py"], {"INTERFACE": "lo"}, "NODE_RANK is not set"),
        (["run", "job.py"], {**JOB, "NODE_RANK": "2", "INTERFACE": "lo"}, "expected less than NODES = 2"),
        (["run", "job.py"], JOB, "INTERFACE is not set"),
        (["run", "job.py"], {**JOB, "INTERFACE": "nosuch0"}, "no such interface here"),
        (["run"], {**JOB, "INTERFACE": "lo"}, "which program?"),
        (["fly"], {}, "no verb 'fly'"),
        *((["container", "job.py"], {**JOB, **FIVE, name: ""}, f"{name} is not set") for name in FIVE),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: list[str], variables: dict[str, str], says: str) -> None:
    code, calls, text = asked(tmp_path, *arguments, **variables)
    assert code == 2 and calls == [] and says in text and len(text.splitlines()) == 1


@pytest.mark.parametrize("linter", ["shellcheck", "bash"])
def test_lint(linter: str) -> None:
    program = shutil.which(linter) or shutil.which(linter, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{linter} is not installed (it is in the dev extra)")
    done = subprocess.run(
        [program, *(["-n"] if linter == "bash" else []), str(SCRIPT)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_root
def test_two_namespaces_train_as_two_hosts(tmp_path: Path) -> None:
    """The example under the launcher, on both ends of a real link at once; every process has its own log."""
    example = ROOT / "examples" / "distributed" / "powersgd.py"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    with network(2, Shape(200.0, 200.0)) as ends:
        jobs = []
        for host, end in enumerate(ends):
            own = {"NODE_RANK": str(host), "MASTER_ADDR": "10.77.0.1", "INTERFACE": "eth0", "LOGS": f"logs {host}"}
            path = f"{Path(sys.executable).parent}:{tmp_path / 'bin'}:{os.environ['PATH']}"
            environment = {**os.environ, **own, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = ["ip", "netns", "exec", end, "bash", str(SCRIPT), "run", str(example)]
            jobs.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        try:
            said = [job.communicate(timeout=120)[0] for job in jobs]
        finally:
            for job in jobs:
                job.kill()
    assert [job.returncode for job in jobs] == [0, 0]
    assert "bytes sent by each process" in said[0] and "bytes sent" not in said[1]
    assert all(list(tmp_path.glob(f"logs {host}/**/stdout.log")) for host in range(2))
