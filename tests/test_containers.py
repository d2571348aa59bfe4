"""The container script's command lines, with a ``docker`` that writes down what it is asked; the files' lint."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "containers" / "descentlab-container"
VOLUMES = ["--volume", "descentlab-results:/lab/out", "--volume", "descentlab-cache:/lab/cache"]
HELPER = ["run", "--rm", "--user", "0", "--volume", "descentlab-results:/volumes/results:ro"]
HELPER += ["--volume", "descentlab-cache:/volumes/cache:ro"]
HOLDER = ["create", "--volume", "descentlab-results:/lab/out:ro", "descentlab:cpu"]

STUB = """#!{python}
import json, os, sys
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
answers = json.loads(os.environ["STUB_ANSWERS"])
for words, (code, text) in answers.items():
    if " ".join(sys.argv[1:]).startswith(words):
        sys.stdout.buffer.write(bytes.fromhex(text))
        sys.exit(code)
"""


class Docker:
    """A directory with a stub ``docker``; ``answers``: beginning of a command line -> (exit code, output)."""

    def __init__(self, path: Path) -> None:
        self.path, self.log = path, path / "log"
        (path / "bin").mkdir()
        self.work = path / "a folder"  # a blank in every path: unquoted words would fall apart
        self.work.mkdir()
        stub = path / "bin" / "docker"
        stub.write_text(STUB.format(python=sys.executable))
        stub.chmod(0o755)
        self.answers: dict[str, tuple[int, bytes]] = {}

    def __call__(self, *arguments: str, **variables: str) -> tuple[int, list[list[str]], str]:
        """(exit code, docker's argument lists, output) of the script."""
        self.log.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
            "STUB_LOG": str(self.log),
            "STUB_ANSWERS": json.dumps({words: (code, out.hex()) for words, (code, out) in self.answers.items()}),
            **variables,
        }
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=self.work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return done.returncode, calls, done.stdout + done.stderr


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


def tar_of(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_build(docker: Docker) -> None:
    for target in ("cpu", "cuda"):
        arguments = [] if target == "cpu" else [target]
        code, calls, _ = docker("build", *arguments)
        file = str(ROOT / "containers" / "Dockerfile")
        assert code == 0
        assert calls == [
            ["build", "--file", file, "--target", target, "--tag", f"descentlab:{target}", str(ROOT)],
        ]
    code, calls, said = docker("build", "tpu")
    assert code == 2 and calls == [] and "build cpu or build cuda, not tpu" in said


def test_run_keeps_every_argument_whole(docker: Docker) -> None:
    """Settings with blanks, quotes and stars arrive as they were typed; without a terminal there is no -t."""
    words = ["run", "recovery", "model={name: mlp, hidden: [4]}", "--out", "out/it's *", ""]
    code, calls, _ = docker("run", *words)
    assert code == 0 and calls == [["run", "--init", *VOLUMES, "--rm", "descentlab:cpu", *words]]


def test_run_of_files(docker: Docker) -> None:
    (docker.work / "my study.yaml").write_text("study: recovery\n")
    (docker.work / "look.py").write_text("")
    here = ["--volume", f"{docker.work}:/lab/files:ro"]
    assert docker("run", "my study.yaml", "seed=1")[1] == [
        ["run", "--init", *VOLUMES, "--rm", *here, "descentlab:cpu", "run", "/lab/files/my study.yaml", "seed=1"]
    ]
    assert docker("run", "./look.py", "-v")[1] == [
        [
            "run",
            "--init",
            *VOLUMES,
            "--rm",
            *here,
            "--entrypoint",
            "python3",
            "descentlab:cpu",
            "/lab/files/look.py",
            "-v",
        ]
    ]
    code, calls, said = docker("run", "none.py")
    assert code == 2 and calls == [] and "no file none.py" in said
    code, calls, said = docker("run", str(SCRIPT.parent / "compose.yaml"))
    assert code == 2 and calls == [] and "not below the current directory" in said


def test_run_without_arguments_says_so(docker: Docker) -> None:
    code, calls, said = docker("run")
    assert code == 2 and calls == [] and "what is to be run?" in said


@pytest.mark.parametrize(
    ("verb", "options", "before"),
    [
        ("gpu", ["--rm", "--gpus", "all"], []),
        ("recovery", ["--rm"], ["run", "recovery"]),
        ("optimizer", ["--rm"], ["compat", "v3"]),
    ],
)
def test_gpu_recovery_and_optimizer(docker: Docker, verb: str, options: list[str], before: list[str]) -> None:
    tag = "cuda" if verb == "gpu" else "cpu"
    _, calls, _ = docker(verb, "seed=1 2")
    assert calls == [["run", "--init", *VOLUMES, *options, f"descentlab:{tag}", *before, "seed=1 2"]]


def test_interactive_without_a_terminal(docker: Docker) -> None:
    _, calls, _ = docker("interactive")
    here = ["--volume", f"{docker.work}:/lab/files:ro"]
    assert calls == [["run", "--init", "--rm", *VOLUMES, *here, "--entrypoint", "bash", "descentlab:cpu"]]


@pytest.mark.skipif(shutil.which("script") is None, reason="script(1), which makes a terminal, is not installed")
def test_interactive_with_a_terminal(docker: Docker) -> None:
    docker.log.write_text("")
    environment = {**os.environ, "PATH": f"{docker.path / 'bin'}:{os.environ['PATH']}"}
    environment |= {"STUB_LOG": str(docker.log), "STUB_ANSWERS": "{}"}
    command = ["script", "--quiet", "--command", f"bash '{SCRIPT}' interactive", "/dev/null"]
    subprocess.run(command, cwd=docker.work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert json.loads(docker.log.read_text())[:5] == ["run", "--init", "--rm", "--interactive", "--tty"]


def test_background_makes_way_for_its_name(docker: Docker) -> None:
    """A container that ended is removed first; one that runs is left alone and named."""
    inspect = ["container", "inspect", "--format", "{{.State.Status}}", "descentlab"]
    started = ["run", "--init", *VOLUMES, "--detach", "--name", "descentlab", "descentlab:cpu", "run", "recovery"]
    docker.answers = {"container inspect": (1, b"")}
    assert docker("background", "run", "recovery")[1] == [inspect, started]
    docker.answers = {"container inspect": (0, b"exited\n")}
    assert docker("background", "run", "recovery")[1] == [inspect, ["container", "rm", "descentlab"], started]
    docker.answers = {"container inspect": (0, b"running\n")}
    code, calls, said = docker("background", "run", "recovery")
    assert code == 2 and calls == [inspect] and "descentlab is running" in said


def test_copy_results(docker: Docker) -> None:
    docker.answers = {"create": (0, b"c0ffee\n")}
    code, calls, _ = docker("copy-results", "to here")
    assert code == 0
    assert calls == [HOLDER, ["cp", "c0ffee:/lab/out/.", "to here"], ["container", "rm", "c0ffee"]]


def test_copy_results_falls_back_to_a_stream(docker: Docker) -> None:
    docker.answers = {"create": (0, b"c0ffee\n"), "cp": (1, b""), "run": (0, tar_of(a="one"))}
    code, calls, _ = docker("copy-results")
    stream = [*HELPER, "--entrypoint", "tar", "descentlab:cpu", "--create", "--file", "-"]
    assert code == 0 and calls[2:] == [["container", "rm", "c0ffee"], [*stream, "--directory", "/volumes/results", "."]]
    assert (docker.work / "extracted_results" / "a").read_text() == "one"


def test_extract_safe(docker: Docker) -> None:
    docker.answers = {"run": (0, tar_of(a="one", b="two"))}
    code, calls, _ = docker("extract-safe", "to here")
    assert code == 0 and len(calls) == 1 and (docker.work / "to here" / "b").read_text() == "two"
    docker.answers = {"run": (1, b"")}
    assert docker("extract-safe", "elsewhere")[0] != 0  # a failed stream is a failure


def test_copy_single(docker: Docker) -> None:
    docker.answers = {"create": (0, b"c0ffee\n")}
    for given in ("recovery/report/index.html", "/lab/out/recovery/report/index.html"):
        code, calls, _ = docker("copy-single", given)
        copied = ["cp", "c0ffee:/lab/out/recovery/report/index.html", "."]
        assert code == 0 and calls == [HOLDER, copied, ["container", "rm", "c0ffee"]]
    docker.answers["cp"] = (1, b"")
    code, calls, said = docker("copy-single", "nothing")
    assert code == 2 and calls[-1] == ["container", "rm", "c0ffee"] and "there is no nothing" in said
    for wrong in ([], ["../secrets"]):
        code, calls, _ = docker("copy-single", *wrong)
        assert code == 2 and calls == []


def test_list_results(docker: Docker) -> None:
    code, calls, _ = docker("list-results")
    assert code == 0 and calls[0][:-1] == [*HELPER, "--entrypoint", "sh", "descentlab:cpu", "-c"] and len(calls) == 1
    assert "head -n 20" in calls[0][-1]


def test_backup(docker: Docker) -> None:
    docker.answers = {"run": (0, b"bytes")}
    code, calls, _ = docker("backup", "kept here")
    command = ["--entrypoint", "tar", "descentlab:cpu", "--create", "--gzip", "--file", "-", "--directory", "/volumes"]
    assert code == 0 and calls == [[*HELPER, *command, "results", "cache"]]
    (file,) = (docker.work / "kept here").iterdir()
    assert file.read_bytes() == b"bytes" and file.match("descentlab-backup-????????_??????.tar.gz")
    docker.answers = {"run": (1, b"half")}
    code, _, said = docker("backup", "broken")
    assert code == 2 and "the backup failed" in said and not list((docker.work / "broken").iterdir())


def test_volume_info_and_clean_volumes(docker: Docker) -> None:
    both = ["descentlab-results", "descentlab-cache"]
    assert docker("volume-info")[1] == [["volume", "inspect", *both]]
    code, calls, said = docker("clean-volumes")
    assert code == 2 and calls == [] and "clean-volumes --yes" in said  # no terminal: never waits, never deletes
    assert docker("clean-volumes", "--yes")[1] == [["volume", "rm", "--force", *both]]


def test_help_and_unknown_verbs(docker: Docker) -> None:
    code, calls, said = docker()
    verbs = "build interactive run gpu background recovery copy-results extract-safe copy-single list-results backup"
    assert code == 0 and calls == [] and all(f"\n  {verb}" in said for verb in [*verbs.split(), "volume-info", "help"])
    code, calls, said = docker("fly")
    assert code == 2 and calls == [] and "there is no verb fly" in said


def test_names_can_be_chosen(docker: Docker) -> None:
    _, calls, _ = docker("run", "list", "models", DESCENTLAB_IMAGE="mine")
    assert calls[0][-3:] == ["mine:cpu", "list", "models"]


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "containers" / "compose.yaml").read_text())


def test_compose_and_script_share_their_volumes() -> None:
    """Without explicit names compose would put its project's in front, and the script would look elsewhere."""
    described = compose()
    assert {key: volume["name"] for key, volume in described["volumes"].items()} == {
        "results": "descentlab-results",
        "cache": "descentlab-cache",
    }
    for service in described["services"].values():
        mounted = [f"descentlab-{volume}" for volume in service["volumes"]]
        assert mounted == VOLUMES[1::2]
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    file = (ROOT / "containers" / "Dockerfile").read_text()
    for service in described["services"].values():
        assert f" AS {service['build']['target']}\n" in file


def test_the_image_gets_what_the_build_may_see() -> None:
    """Every path that the Dockerfile copies exists and is let through by the ignore file."""
    lines = (ROOT / "containers" / "Dockerfile").read_text().splitlines()
    copied = [w for line in lines if line.startswith("COPY ") and "--from" not in line for w in line.split()[1:-1]]
    ignore = (ROOT / "containers" / "Dockerfile.dockerignore").read_text().split()
    assert copied and all((ROOT / path).exists() and f"!{path}" in ignore for path in copied)


@pytest.mark.parametrize(
    ("linter", "file"),
    [("hadolint", "Dockerfile"), ("shellcheck", "descentlab-container"), ("bash", "descentlab-container")],
)
def test_lint(linter: str, file: str) -> None:
    program = shutil.which(linter) or shutil.which(linter, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{linter} is not installed (it is in the dev extra)")
    options = ["-n"] if linter == "bash" else []
    done = subprocess.run([program, *options, str(SCRIPT.parent / file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
