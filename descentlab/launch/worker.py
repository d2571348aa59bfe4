"""A worker process of the local pool: ``python -m descentlab.launch.worker``.

One JSON object per line. In: ``{"study": YAML text, "out": DIR, "overwrite": bool, "warm_up": bool}`` (plan it, or
load its data alone), ``{"path": DIR, "block": key}`` or ``{"stop": true}``; end of input also stops it, so a worker
never outlives the process that started it. Out: ``{"steps": n}`` (at most five times a second), ``{"outcome",
"message"}``. User prints go to a log.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from ..core.errors import StudyError, UserError
from ..store.atomic import writing

REPORT_S = 0.2


def _listen(source: TextIO, orders: queue.Queue[dict[str, Any] | None], stopping: threading.Event) -> None:
    for line in source:
        order = json.loads(line)
        if order.get("stop"):
            break
        orders.put(order)
    stopping.set()
    orders.put(None)


class _Reporter:
    """Sums the member-steps and passes them on a few times a second."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.steps, self.last = out, 0, time.monotonic()

    def tick(self, member_steps: int) -> None:
        self.steps += member_steps
        if time.monotonic() - self.last >= REPORT_S:
            self.flush()

    def flush(self) -> None:
        if self.steps:
            say(self.out, steps=self.steps)
        self.steps, self.last = 0, time.monotonic()


def say(out: TextIO, **message: Any) -> None:
    """One line to the parent; a parent that is gone is noticed on the input side."""
    try:
        out.write(json.dumps(message) + "\n")
        out.flush()
    except BrokenPipeError:
        pass


def main() -> None:
    """Serve blocks until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin, orders, stopping), daemon=True).start()

    import torch

    torch.set_num_threads(1)
    from .block import run_block  # after torch: this is the slow part, done while the parent still plans

    gc.freeze()  # what was imported stays: no need to look through it again and again
    while (order := orders.get()) is not None:
        reporter = _Reporter(out)
        outcome, message = _serve(run_block, order, reporter, stopping)
        reporter.flush()
        say(out, outcome=outcome, message=message, block=order.get("block"))


def _prepare(order: dict[str, Any]) -> tuple[str, Any]:
    from ..config.resolve import resolve
    from .prepare import prepare, warm_up

    try:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "study.yaml"
            study.write_text(order["study"])
            if order.get("warm_up"):
                with suppress(Exception):  # the one that plans says what is wrong
                    warm_up(resolve(study, limit=None))
                return "warm", None
            return "prepared", prepare(resolve(study, limit=None), Path(order["out"]), order["overwrite"])
    except StudyError as error:
        return "failed", str(error)
    except UserError as error:  # the user's, to be shown by the parent as if it had found it
        return "refused", [error.key, plain(error.value), error.expected, error.hint]
    except Exception:  # in code of the user's: said once by the parent, however many workers plan
        return "crashed", traceback.format_exc()


def plain(value: Any) -> Any:
    """The value as JSON can carry it."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _serve(run_block: Any, order: dict[str, Any], reporter: _Reporter, stopping: threading.Event) -> tuple[str, Any]:
    if "study" in order:
        return _prepare(order)
    path, key = Path(order["path"]), order["block"]
    try:
        with _log(path, key):
            return run_block(path, key, tick=reporter.tick, stop=stopping.is_set), ""
    except (StudyError, UserError) as error:
        return "failed", str(error)
    except BaseException as error:  # any failure of one block must not take the others with it
        return "failed", f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def _log(path: Path, key: str) -> Iterator[None]:
    """What is printed inside goes to the block's log, and so does the traceback of what is raised."""
    with writing(path / "logs" / key):
        (path / "logs").mkdir(exist_ok=True)
        log = (path / "logs" / f"{key}.log").open("a", buffering=1)
    with log:
        os.dup2(log.fileno(), 2)
        os.dup2(log.fileno(), 1)
        try:
            yield
        except BaseException:
            with suppress(OSError):  # a disk that is full has no room for a log either
                traceback.print_exc()
                sys.stderr.flush()
            raise


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # everything is written; taking torch down in order would cost another second
