"""Tells somebody that a study has ended: a command of the user's, or a message to a URL. Never fails the study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request

from ..store import RunDirectory, status
from ..store.directory import LOCK_WAIT_S, TOLD

PAUSE_S = 60.0  # per directory at most one message in this time, so that a cluster's jobs do not flood anybody
ANSWER_S = 30.0


def tell(directory: RunDirectory) -> None:
    """Tell whom the settings name how the directory's runs ended; once in ``PAUSE_S``. Trouble becomes an event."""
    runs = directory.read_jsonl("resolved.jsonl")
    whom = str(runs[0]["settings"].get("notify", "")) if runs else ""
    if not whom or not _due(directory):
        return
    counts = status(directory.path).counts()
    text = (
        f"{directory.study}: {', '.join(f'{n} {state}' for state, n in counts.items())} in {directory.path.resolve()}"
    )
    try:
        if whom.startswith(("http://", "https://")):
            _post(whom, text)
        else:
            _call(whom, text, directory, "failed" if counts.get("failed") else "done")
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        directory.event("warning", f"notify: {said}")
        print(f"note: nobody was told that the study has ended: {said}", file=sys.stderr)


def _due(directory: RunDirectory) -> bool:
    stamp = directory.path / TOLD
    with directory.lock(LOCK_WAIT_S):  # two jobs may end together
        if stamp.exists() and time.time() - stamp.stat().st_mtime < PAUSE_S:
            return False
        stamp.touch()
    return True


def _call(command: str, text: str, directory: RunDirectory, state: str) -> None:
    """Run the user's command in their shell; what it is told stands in its environment."""
    told = {
        "DESCENTLAB_STUDY": directory.study,
        "DESCENTLAB_DIR": str(directory.path.resolve()),
        "DESCENTLAB_STATE": state,
        "DESCENTLAB_TEXT": text,
    }
    done = subprocess.run(
        command, shell=True, env={**os.environ, **told}, capture_output=True, text=True, timeout=ANSWER_S
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise OSError(f"'{command}' ended with exit code {done.returncode}: {last}")


def _post(url: str, text: str) -> None:
    """``{"text": …}``, which chat services' incoming webhooks take."""
    body = json.dumps({"text": text}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_S):
        pass
