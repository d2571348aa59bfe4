"""A Slurm of one node for tests: munge, slurmctld and slurmd in a private folder, on free ports, without systemd.

Nothing is installed and nothing outside the folder is written. What was started is stopped, by its process id.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
CPUS = 4  # said to be there: the jobs of these tests are small
START_S = 30.0

# proctrack and task: without cgroups. cred_expire: seconds until a requeued job may start again (5 is the least).
# defer and the intervals: jobs start within about two seconds of being submitted, released or requeued. MinJobAge:
# squeue forgets what has ended early.
CONFIGURATION = """
ClusterName=descentlab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,defer
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=3
CompleteWait=0
MinJobAge=10
PropagateResourceLimits=NONE
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=node Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no node can be started here, or None."""
    absent = [name for name in PROGRAMS if _which(name) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurm-wlm, munge)"
    if os.getuid() != 0:
        return "slurmd of this test needs root"
    try:
        socket.gethostbyname(socket.gethostname().partition(".")[0])
    except OSError:
        return "this host's own name does not resolve"
    return None


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@contextlib.contextmanager
def one_node(folder: Path) -> Iterator[Path]:
    """Start the node; its slurm.conf, for SLURM_CONF. ``folder`` must be short: a socket's path has 108 characters."""
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    controller, node = _free_ports(2)
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(folder=folder, host=host, user="root", controller=controller, node=node, cpus=CPUS)
    configuration = folder / "slurm.conf"
    configuration.write_text(text)
    munge = folder / "munge"
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    commands = [
        [_which("munged"), "--foreground", "--force", *(f"--{o}={munge / n}" for o, n in names.items())],
        [_which("slurmctld"), "-D", "-c", "-f", str(configuration)],
        [_which("slurmd"), "-D", "-f", str(configuration), "-N", "node"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    watcher = _watch(folder)
    old = _end_on_sigterm()
    try:
        for command in commands:
            with (folder / f"{Path(str(command[0])).name}.out").open("wb") as out:
                started.append(
                    subprocess.Popen([str(c) for c in command], stdout=out, stderr=out, preexec_fn=_die_with_parent)
                )
            if len(started) == 1:
                _wait_for(lambda: (munge / "socket").exists(), "munged")
        environment = {**os.environ, "SLURM_CONF": str(configuration)}
        _wait_for(lambda: b"idle" in _output(["sinfo", "-h", "-o", "%T"], environment), "the node")
        yield configuration
    finally:
        _stop(started, {**os.environ, "SLURM_CONF": str(configuration)})
        if old is not None:
            signal.signal(signal.SIGTERM, old)
        watcher.communicate()  # nothing is left for it to do


# Ends what names the folder in its command line or environment (daemons, step daemons, jobs), by its process id.
WATCHER = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
folder, spared = sys.argv[1].encode(), (os.getpid(), os.getppid())
sys.stdin.buffer.read()
for _ in range(20):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in spared:
            try:
                said = [open(f"/proc/{name}/{file}", "rb").read() for file in ("cmdline", "environ")]
            except OSError:
                continue
            if any(folder in text for text in said):
                found.append(int(name))
    for process in found:
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            pass
    if not found:
        break
"""


def _watch(folder: Path) -> subprocess.Popen[bytes]:
    """A process that outlives the tests, however they end (its input ends with them), and clears up after them.

    ``folder`` is a temporary one, so nothing else can name it.
    """
    command = [sys.executable, "-c", WATCHER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _end_on_sigterm() -> Any:
    """Let SIGTERM (a runner that gives up) unwind the tests as Ctrl-C does; the handler there was before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, end)


def _die_with_parent() -> None:
    """In a daemon before it starts: SIGTERM once the tests are gone, however they ended (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _stop(started: list[subprocess.Popen[bytes]], environment: dict[str, str]) -> None:
    """End the jobs, then the daemons in the reverse order."""
    if len(started) == 3:
        _output(["scancel", "--full", "--signal=KILL", "--me"], environment)
        _output(["scancel", "--me"], environment)
        with contextlib.suppress(TimeoutError):
            _wait_for(lambda: not _output(["squeue", "-h"], environment).strip(), "the jobs to end")
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _output(command: list[str], environment: dict[str, str]) -> bytes:
    return subprocess.run(command, env=environment, capture_output=True, timeout=30).stdout


def _wait_for(ready: object, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {START_S:.0f} s for {what}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
