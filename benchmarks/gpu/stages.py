"""Stages in processes of their own, each in a time limit: whatever happens in one, the others run and all is kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE = 4.0  # seconds a stage has to end after an interrupt, before it is killed
LIMIT = "{limit}"
LEAST = 2.0  # no stage is started for less
TICK = 1.0
TAIL_LINES = 15  # of the log of a stage that failed, which are printed
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "FAILED", "TIMED OUT", "NOT RUN"


@dataclass(frozen=True)
class Stage:
    """``share`` of the time that is left when the stage begins is its limit, so that time one stage saves goes to the
    later ones and a slow one cannot take all of it. In ``command``, LIMIT stands for that limit in seconds."""

    name: str
    command: Sequence[str]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)
    accepted: tuple[int, ...] = (0,)  # exit codes that are no failure
    meanings: Mapping[int, str] = field(default_factory=dict)  # exit code -> what it says
    needs: str = ""  # a stage without whose success this one is not worth its time
    after_failure_of: str = ""  # the stage of which this one is to find out what is wrong; else it is passed over


def write_atomically(path: Path, text: str) -> None:
    """A reader, or what is left after a kill, sees the old text or the new one and nothing between."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(text)
    draft.replace(path)


def write_part(path: Path, data: dict[str, Any]) -> None:
    """What a stage has found so far."""
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def read_part(path: Path) -> dict[str, Any]:
    """What a stage has written; empty before it writes."""
    return json.loads(path.read_text()) if path.exists() else {}


def _signal(group: int, number: signal.Signals) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _stop(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ends the stage and all that it started: first as Ctrl-C does, which lets pytest print its summary."""
    if process.poll() is None and _signal(process.pid, signal.SIGINT):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    _signal(process.pid, signal.SIGKILL)  # also those of the group that outlived their leader
    process.wait()


def run_stage(
    stage: Stage, folder: Path, limit: float, grace: float = GRACE, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs one stage with its output in ``folder/<name>.log``; calls ``tick`` while it waits. Never raises for what
    the stage does."""
    log = folder / f"{stage.name}.log"
    outcome: dict[str, Any] = {"name": stage.name, "limit_s": round(limit, 1), "log": log.name, "seconds": 0.0}
    if limit < LEAST:
        return {**outcome, "status": NOT_RUN, "detail": "no time was left"}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    command = [word.replace(LIMIT, f"{limit:.0f}") for word in stage.command]
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {**outcome, "status": FAILED, "detail": f"could not be started: {error}"}
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                try:
                    process.wait(min(TICK, max(0.01, limit - (time.monotonic() - started))))
                except subprocess.TimeoutExpired:
                    tick()
            code = process.poll()
        finally:
            _stop(process, grace)
    outcome["seconds"] = round(time.monotonic() - started, 1)
    if code is None:
        return {**outcome, "status": TIMED_OUT, "detail": f"stopped after {limit:.0f} s"}
    words = stage.meanings.get(code, f"exit status {code}" if code else "")
    return {**outcome, "status": PASSED if code in stage.accepted else FAILED, "detail": words}


def run_stages(
    stages: Sequence[Stage], folder: Path, end: float, changed: Callable[[list[dict[str, Any]]], None],
    grace: float = GRACE,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs all stages in order until ``end`` of time.monotonic(). ``changed`` gets the outcomes so far, often."""
    outcomes: list[dict[str, Any]] = []
    for stage in stages:
        failed = {o["name"] for o in outcomes if o["status"] != PASSED}
        if stage.after_failure_of and stage.after_failure_of not in failed:
            continue
        if stage.needs in failed:
            outcomes.append({"name": stage.name, "limit_s": 0.0, "log": f"{stage.name}.log", "seconds": 0.0,
                             "status": NOT_RUN, "detail": f"{stage.needs} did not pass"})  # fmt: skip
            continue
        limit = stage.share * (end - time.monotonic() - grace)
        waiting = {"name": stage.name, "limit_s": round(limit, 1), "log": f"{stage.name}.log", "seconds": 0.0,
                   "status": "running", "detail": ""}  # fmt: skip
        now = [*outcomes, waiting]
        changed(now)
        outcomes.append(run_stage(stage, folder, limit, grace, tick=partial(changed, now)))
        changed(outcomes)
    changed(outcomes)
    return outcomes


def tail(path: Path, lines: int) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
