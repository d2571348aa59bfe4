"""A crash in one run must not take the others with it: a block that failed is cut into smaller ones and tried again."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..core.errors import StudyError, UserError
from ..store import RunDirectory
from ..store.claim import take
from ..store.directory import LOCK_WAIT_S
from .pool import DIED, KEPT, Outcome


def pieces(block: dict[str, Any]) -> list[dict[str, Any]]:
    """The block of plan.json cut by replicate, or by run where it holds one replicate; [] for a single run."""
    plans = block["plans"]
    several = len({run["replicate"] for run in plans}) > 1
    parts: dict[Any, list[dict[str, Any]]] = {}
    for run in plans:
        parts.setdefault(run["replicate"] if several else run["id"], []).append(run)
    return [_piece(block, runs) for runs in parts.values()] if len(parts) > 1 else []


def _piece(block: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    from .plan import read_block  # imports torch, which the parent of worker processes does not need otherwise

    ids = [run["id"] for run in runs]
    key = hashlib.sha256(json.dumps([block["key"], ids]).encode()).hexdigest()[:12]
    made = {**block, "key": key, "runs": ids, "plans": runs}
    plan = replace(read_block(made).plan, key=key)
    return {**made, "steps": plan.stop, "member_steps": plan.work_units()}


def isolate(
    directory: RunDirectory, outcomes: Sequence[Outcome], run: Callable[[list[dict[str, Any]]], list[Outcome]]
) -> list[Outcome]:
    """Cut every block that raised into pieces, ``run`` those, and so on down to single runs; all final outcomes.

    plan.json then holds the pieces, so that resume and status obey them. Not cut: a block whose process died (the
    machine's doing, as out of memory), one whose pieces all failed with the same message (the cause is not one run),
    and anything once ``run`` was interrupted.
    """
    final = [o for o in outcomes if not _by_one_run(o)]
    waiting = [o for o in outcomes if o not in final]
    while waiting:
        plan = directory.read_json("plan.json")
        cut = {b["key"]: made for b in plan["blocks"] if (made := pieces(b)) and b["key"] in {o.key for o in waiting}}
        final += [o for o in waiting if o.key not in cut]
        waiting = [o for o in waiting if o.key in cut]
        if not waiting or any(o.state == "interrupted" for o in final):
            return [*final, *waiting]
        with ExitStack() as stack:
            final += [Outcome(o.key, "elsewhere") for o in waiting if not _claimed(directory, o.key, stack)]
            waiting = [o for o in waiting if o.key not in {other.key for other in final}]
            for outcome in waiting:
                text = f"block {outcome.key} failed ({outcome.message}); trying its {len(cut[outcome.key])} parts alone"
                print(text, file=sys.stderr)
                directory.event("split", text, block=outcome.key)
                shutil.rmtree(directory.block_folder(outcome.key), ignore_errors=True)
            _replace_blocks(directory, {outcome.key: cut[outcome.key] for outcome in waiting})
        tried = {outcome.key: run(cut[outcome.key]) for outcome in waiting}
        waiting = []
        for parts in tried.values():
            bad = [o for o in parts if _by_one_run(o)]
            alike = len(bad) == len(parts) and len({o.message for o in bad}) == 1
            waiting += [] if alike else bad
            final += parts if alike else [o for o in parts if o not in bad]
    return final


def _claimed(directory: RunDirectory, key: str, stack: ExitStack) -> bool:
    """Whether nobody else has taken the block up since it failed; held until the stack is left."""
    claim = take(directory.path, key)
    if claim is not None:
        stack.enter_context(claim)
    return claim is not None


def _replace_blocks(directory: RunDirectory, cut: dict[str, list[dict[str, Any]]]) -> None:
    with directory.lock(LOCK_WAIT_S):  # others may be cutting their blocks
        plan = directory.read_json("plan.json")
        plan["blocks"] = [piece for block in plan["blocks"] for piece in cut.get(block["key"], [block])]
        directory.replace_json("plan.json", plan)


def _by_one_run(outcome: Outcome) -> bool:
    """Whether a run may have failed the block. A process that died, a full disk and a failed allocation are the
    machine's doing; of the last two the block's checkpoint stays and is what the same command resumes from."""
    return outcome.state == "failed" and not outcome.message.startswith(DIED) and KEPT not in outcome.message


def attempt(directory: RunDirectory, key: str, work: Callable[[], str]) -> Outcome:
    """One block in this process: an exception becomes its outcome, the traceback goes to its log.

    What the user has to mend (a damaged file, a full disk) is raised: it is nothing about one block.
    """
    try:
        return Outcome(key, work())
    except (UserError, StudyError):
        raise
    except Exception as error:  # any failure of one block must not take the others with it
        path = directory.log_path(key)
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as log:
            traceback.print_exc(file=log)
        return Outcome(key, "failed", f"{type(error).__name__}: {error}".splitlines()[0])
