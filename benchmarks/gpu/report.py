"""The Markdown summary of a run of ``python -m benchmarks gpu``."""

from __future__ import annotations

from typing import Any

from ..record import seconds, table
from . import goals, kernel_report, modes
from .predictions import SOURCE
from .streams import COPIES
from .traffic import PARTS, STATES, part_bytes

# Stages with errors and notes.
MEASURING = (
    "ceilings", "exercise", "kernels", "variants", "ncu", "races", "end_to_end", "tune", "more_races", "more_training",
)  # fmt: skip
TESTS = ("tests", "triton_tests")
SANITIZERS = ("memcheck", "sanitizer")
MOST_SIZES = 3  # of the candidates that were timed, those that are listed
MOST_LAUNCHES = 8  # names of launched kernels that are listed for one step


def _title(data: dict[str, Any]) -> str:
    if data["rehearsal"]:
        return f"# Rehearsal on the CPU of the GPU benchmarks: no GPU ran, no goal is judged\n\n{data['device']}. "
    return f"# GPU benchmarks: {data['device']}\n\n"


def _head(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    lines = [f"{_title(data)}Commit {data['commit']}, {data['date']}; {versions}."]
    for name, facts in (("GPU", data["gpu"]), ("Clocks at the start", data["clocks"])):
        if facts:
            lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()) + ".")
    measured = [data[name]["backends"] for name in goals.PARTS if name in data]
    if measured:
        backends = dict.fromkeys(backend for part in measured for backend in part)
        lines.append(f"Backends measured: {', '.join(backends) or 'none'}.")
    return "\n".join(lines) + "\n"


def _stages(data: dict[str, Any]) -> str:
    rows = [
        [s["name"], s["status"], f"{s['seconds']:.0f} s", f"{s['limit_s']:.0f} s", s["detail"]] for s in data["stages"]
    ]
    parts = ["\n## Stages\n\n", table(["stage", "status", "took", "limit", "detail"], rows)]
    for name in TESTS:
        if name in data:
            parts.append(f"\n{name}: " + ", ".join(f"{count} {what}" for what, count in data[name].items()) + ".\n")
    for name in SANITIZERS:
        if name in data:
            rows = [[tool, f["status"], f["summary"]] for tool, f in data[name].items()]
            parts.append("\n" + table(["all ops, small odd sizes", "status", "summary"], rows))
    return "".join(parts)


def _errors(data: dict[str, Any]) -> str:
    found = [f"{name}: {error}" for name in MEASURING for error in data.get(name, {}).get("errors", [])]
    return "\n## Errors\n" + "".join(f"\n* {error}" for error in found) + "\n" if found else ""


def _goals(data: dict[str, Any]) -> str:
    words = {True: "yes", False: "NO", None: "not judged"}
    rows = [[v.what, v.who, v.result, v.predicted, v.goal, words[v.met]] for v in goals.verdicts(data)]
    if not rows:
        return ""
    return "\n## Goals\n\n" + table(["what", "backend", "result", "predicted", "goal", "met"], rows) + f"\n{SOURCE}.\n"


def _method() -> str:
    model = ";".join(
        f"\n  {mode.name}, {base}: " + ", ".join(f"{part} {part_bytes(part, base, mode)}N" for part in PARTS)
        for mode in (modes.FP32, modes.MASTERS)
        for base in STATES
    )
    return f"""
## How this was measured

* perturb = gradient norm, backup and w + e; update = restore and base step; base = a step without SAM; step = perturb
  and update.
* Bytes that N parameters need (bf16 without masters: half of fp32):{model}; the copy {4 * COPIES}N in fp32.
  fraction = bandwidth by this count / bandwidth of `dst.copy_(src)` with N elements, in the same rounds.
* Kernels: durations in the profiler's trace, of several SAM steps, copies and reads in turns. of a read: over the
  bandwidth of the fastest of torch's sum, max and norm over as many bytes as the gradients have.
* perturb, update, base and copy: time on the device alone, launched while the device is held busy (host time shows
  where more is launched than its queue takes). step: SAM steps back to back, so the slower of host and device; it
  includes setting p.grad of every parameter twice.
* Entrants take turns round by round; median (best) over the rounds, ratios are medians of single rounds' ratios.
* All entrants took the same first steps. Weights were compared with those of foreach, or of this package in plain torch
  (reference) where others have no such step: in fp32 relative to the largest change (perturbed: to the largest e), in
  bf16 relative to the largest weight.
* Arrays that fit in the last-level cache (few or small tensors) are faster than memory.
"""


def _times(results: list[dict[str, Any]]) -> str:
    whats = list(dict.fromkeys(r["what"] for r in results))
    cell = {(r["who"], r["what"]): f"{seconds(r['median_s'])} ({seconds(r['best_s'])})" for r in results}
    names = dict.fromkeys(r["who"] for r in results)
    return table(["median (best)", *whats], [[who, *(cell.get((who, what), "") for what in whats)] for who in names])


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _agreement(r: dict[str, Any]) -> str:
    rows = [
        [a["who"], _share(a.get("perturbed")), _share(a["weights"]), "yes" if a["agree"] else "NO"]
        for a in r["agreement"]
    ]
    return "\n" + table([f"distance from {r['standard']}", "perturbed", "weights", "agrees"], rows) if rows else ""


def _heading(r: dict[str, Any], more: str = "") -> str:
    size = f"{r['tensors']} tensors, {r['elements']:,} elements"
    return f"\n## {r['title']}, {r['mode']}, {r['base']}{more}\n\n{size}"


def _race(r: dict[str, Any]) -> str:
    copied = f"copy of as many elements: {r['copy_bytes_per_s'] / 1e9:.1f} GB/s read + written"
    clocks = "".join(f", {name} {value}" for name, value in r["clocks"].items())
    against = sorted({x["against"] for x in r["ratios"]})
    parts = [_heading(r, f", beside {', '.join(against)}" if against else ""), f"; {copied}{clocks}.\n\n"]
    parts.append(_times(r["results"]))
    rows = [
        [
            f"{f['who']}: {f['what']}", f"{f['bytes'] / 1e6:,.3f} MB", f"{f['fraction']:.2f}", f"{f['best']:.2f}",
            kernel_report.fraction(f["predicted"]),
        ]
        for f in r["fractions"]
    ]  # fmt: skip
    if rows:
        head = ["fraction of the copy bandwidth", "must move", "median", "of best times", "predicted"]
        parts.append("\n" + table(head, rows))
    rows = [[f"{x['against']} / {x['who']}", f"{x['step']:.2f}", f"{x['device']:.2f}"] for x in r["ratios"]]
    if rows:
        parts.append("\n" + table(["time / time of ours", "step", "perturb + update on the device"], rows))
    parts.append(_agreement(r))
    return "".join(parts)


def _launched(names: dict[str, int]) -> str:
    """The most frequent ones; C++ kernels without their arguments."""
    most = sorted(names.items(), key=lambda item: -item[1])[:MOST_LAUNCHES]
    shown = [f"{count} x {name.split('(')[0].split('<')[0].strip()[:50]}" for name, count in most]
    return ", ".join(shown) + (", ..." if len(names) > len(most) else "")


def _host(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = [[h["who"], f"{h['median_s'] * 1e6:.1f} us", f"{h['best_s'] * 1e6:.1f} us"] for h in found]
    head = f"\n## Host time per SAM step: {found[0]['tensors']} tensors of 64 elements, fp32, sgd\n\n"
    return head + table(["perturb() + step(), waiting for nothing", "median", "best"], rows)


def _launches(found: list[dict[str, Any]], rehearsal: bool) -> str:
    if not found:
        return ""
    rows = [[f"{c['title']}, {c['mode']}, {c['base']}: {c['who']}", str(c["total"]), _launched(c["of"])] for c in found]
    head = "\n## Launches per SAM step: kernels, copies and fills\n\n"
    head += "On the CPU nothing is launched.\n\n" if rehearsal else ""
    return head + table(["perturb + update", "count", "of"], rows)


def _sizes(found: list[dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = []
    for f in found:
        best = [f"{t['per_thread']} x {t['warps']}: {seconds(t['seconds'])}" for t in f["times"][:MOST_SIZES]]
        rows.append([f["what"], ", ".join(best)])
    head = "\n## Block sizes of the Triton kernels\n\n"
    return head + table(["kernel, dtype, dtype of the state", "scalars per thread x warps: time, the fastest"], rows)


def _graphs(g: dict[str, Any]) -> str:
    parts = [_heading(g, ", CUDA graphs"), " (back to back; with a graph, one replay is one step).\n\n"]
    parts.append(_times(g["results"]))
    parts += [f"\n{name} could not be captured: {words}\n" for name, words in g["failures"].items()]
    return "".join(parts) + _agreement(g)


def _training(t: dict[str, Any]) -> str:
    head = f"\n## Training: {t['model']}, {t['base']}, backend {t['backend']}\n\n"
    size = f"batch {t['batch']}, {t['parameters']:,} fp32 parameters, bf16 autocast, random images.\n\n"
    rows = []
    for r in t["results"]:
        over = f"{r['overhead']:+.2%}" if "overhead" in r else ""
        expected = seconds(r["expected_s"]) if "expected_s" in r else ""
        rows.append([r["who"], f"{seconds(r['median_s'])} ({seconds(r['best_s'])})", expected, over])
    names = "passes = forward and backward, base = torch's fused step alone, torch = both, RST(p) = ours\n"
    return head + size + table(["per step", "median (best)", "(1 + p) passes + base", "over it"], rows) + "\n" + names


def overview(data: dict[str, Any]) -> str:
    """How the stages went, what failed, and the goals."""
    return _head(data) + _stages(data) + _errors(data) + _goals(data)


def markdown(data: dict[str, Any]) -> str:
    """The whole summary, of whatever is there so far."""
    parts = [overview(data), kernel_report.markdown(data), _method(), _sizes(data.get("tune", {}).get("sizes", []))]
    parts += [_host(goals.merged(data, "host")), _launches(goals.merged(data, "launches"), data["rehearsal"])]
    parts += [_race(r) for r in goals.merged(data, "races")]
    parts += [_graphs(g) for g in goals.merged(data, "graphs")]
    parts += [_training(t) for t in goals.merged(data, "trainings")]
    notes = dict.fromkeys(
        note for name in MEASURING for note in data.get(name, {}).get("notes", [])
    )  # both stages may say the same
    parts += ["\n## Notes\n" if notes else "", *(f"\n* {note}" for note in notes)]
    return "".join(parts).rstrip() + "\n"
