"""Result files: where and on what a number was measured, one JSON per run, and its summary in Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
FORMAT = 1


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The short commit, with ``-dirty`` when tracked files differ; ``unknown`` without a repository."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def _cpu_model() -> str:
    """Its name, and the numbers that tell those apart which a virtual machine gives one name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = {key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")}
    name, family, model = (match and match[1].strip() for match in found.values())
    if name is None:
        return platform.processor() or platform.machine()
    return name if family is None or model is None else f"{name} (family {family}, model {model})"


def cache_bytes() -> int | None:
    """Bytes of the last-level cache of the first core, or None where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build() -> dict[str, str]:
    try:
        from rst_fused._backends import build_info
    except ImportError:
        return {}
    return build_info()


def environment(
    device: str, names: Sequence[str] = ("torch", "rst_fused", "pytorch_optimizer"), build: dict[str, str] | None = None
) -> dict[str, Any]:
    """Commit, date, machine and versions; ``device`` is the name of what is measured.

    ``names`` are the packages whose versions count. ``build`` is how the extension was built; without it, it is loaded
    and asked.
    """
    return {
        "format": FORMAT,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "machine": {
            "cpu": _cpu_model(), "cores": os.cpu_count(), "last_level_cache_bytes": cache_bytes(),
            "threads": torch.get_num_threads(), "load_average": list(os.getloadavg()),
            "system": f"{platform.system()} {platform.release()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "build": _build() if build is None else build,
    }  # fmt: skip


def cpu_device() -> str:
    return f"{_cpu_model()} x{torch.get_num_threads()}"


def path_for(env: dict[str, Any], command: str) -> Path:
    """``results/<device>-torch<version>-<commit>-<command>.json``."""
    device = re.sub(r"[^a-z0-9]+", "-", env["device"].lower()).strip("-")
    torch_version = str(env["versions"]["torch"]).split("+")[0]
    return RESULTS / f"{device}-torch{torch_version}-{env['commit']}-{command}.json"


def refuse_overwrite(path: Path, force: bool) -> None:
    """Results are append-only: raises FileExistsError when ``path`` is there, unless forced."""
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists and results are append-only; pass --out elsewhere, or --force to replace")


def write(path: Path, data: dict[str, Any], force: bool = False) -> Path:
    """Writes ``data`` as JSON and its Markdown summary beside it; returns the summary's path."""
    refuse_overwrite(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    summary = path.with_suffix(".md")
    summary.write_text(markdown(data))
    return summary


def begin(command: str, out: str | None, force: bool) -> tuple[Path, dict[str, Any]]:
    """Where a command that times races on the CPU will write, by default path_for, and what it has before the first."""
    env = environment(cpu_device())
    path = Path(out) if out else path_for(env, command)
    refuse_overwrite(path, force)
    return path, {**env, "command": command, "races": [], "notes": []}


def show(path: Path, data: dict[str, Any]) -> int:
    """Prints the summary and where it is; the exit status."""
    print(markdown(data))
    print(f"written to {path}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """A result file; ValueError for another format."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result file of format {FORMAT}")
    return data


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also lines up in a terminal: first column to the left, others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in (head, rule, *rows)
    ]
    return "\n".join(lines) + "\n"


def _heading(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    load = data["machine"]["load_average"][0]
    return (
        f"# {data['command']}: {data['device']}\n\n"
        f"Commit {data['commit']}, {data['date']}; {versions}; load average at the start {load:.1f}.\n"
    )


def seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def _order(values: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _times(results: list[dict[str, Any]]) -> str:
    whats = _order([r["what"] for r in results])
    cell = {(r["who"], r["what"]): f"{seconds(r['median_s'])} ({seconds(r['best_s'])})" for r in results}
    rows = [[who, *(cell.get((who, what), "") for what in whats)] for who in _order([r["who"] for r in results])]
    return table(["median (best)", *whats], rows)


def _ratios(ratios: list[dict[str, Any]]) -> str:
    rows = []
    for r in ratios:
        goal = "" if r["goal"] is None else f"{r['goal']:g}"
        met = "" if r["met"] is None else ("yes" if r["met"] else "NO")
        rows.append([f"{r['against']}: {r['what']}", f"{r['median']:.2f}", f"{r['best']:.2f}", goal, met])
    return table([f"time / time of {ratios[0]['ours']}", "median", "best", "goal", "met"], rows)


def _race(race: dict[str, Any]) -> str:
    size = f"{race['tensors']} tensors, {race['elements']:,} elements"
    parts = [f"\n## {race['case']}, {race['label']}\n\n{size}; other processes kept "]
    parts.append(f"{race['other_processes_cores']:.1f} cores busy meanwhile.\n\n")
    parts.append(_times(race["results"]))
    for ours in _order([r["ours"] for r in race["ratios"]]):
        parts.append("\n" + _ratios([r for r in race["ratios"] if r["ours"] == ours]))
    return "".join(parts)


def _of_memory(entry: dict[str, Any], what: str, key: str) -> str:
    found = entry.get(what)
    return f"{found[key] / found['elements']:.2f}" if isinstance(found, dict) else ""


def memory_tables(entries: Sequence[dict[str, Any]]) -> str:
    """A table for each dtype, in bytes per parameter; below them what could not be measured, and why."""
    whats = ("alone", "gpt2")
    parts, missing = [], [f"* {e['mode']}: {e[w]}" for e in entries for w in whats if isinstance(e.get(w), str)]
    measured = [e for e in entries if any(isinstance(e.get(w), dict) for w in whats)]
    for dtype in _order([e["dtype"] for e in measured]):
        mine = [e for e in measured if e["dtype"] == dtype]
        head = [f"{dtype}: bytes per parameter beside the weights", "peak", "predicted", "kept", "predicted"]
        with_model = any("gpt2" in e for e in mine)
        rows = []
        for e in mine:
            row = [e["mode"]]
            for key in ("peak", "kept"):
                row += [_of_memory(e, "alone", key), "" if e["predicted"] is None else f"{e['predicted'][key]:g}"]
            rows.append(row + [_of_memory(e, "gpt2", key) for key in ("peak", "kept") if with_model])
        parts.append(table([*head, *(["GPT-2: peak", "kept"] if with_model else [])], rows))
    return "\n".join([*parts, "".join(f"{line}\n" for line in _order(missing))]).rstrip("\n") + "\n"


def markdown(data: dict[str, Any]) -> str:
    """The summary of a result file."""
    parts = [_heading(data), *(_race(race) for race in data.get("races", []))]
    if "memory" in data:
        parts.append("\n" + memory_tables(data["memory"]))
    parts += [f"\n* {note}" for note in data.get("notes", [])]
    return "".join(parts).rstrip() + "\n"
