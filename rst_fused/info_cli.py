"""`rst-fused info`: what was built, which backends can run here, and on what."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch

import rst_fused
from rst_fused import _backends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def collect() -> dict[str, Any]:
    """All facts, as plain JSON types. `build` is empty where the C++ extension was not built."""
    return {
        "version": rst_fused.__version__,
        "build": dict(_backends.build_info()),
        "backends": [
            {"name": backend.name, "available": backend.available, "reason": backend.reason}
            for backend in _backends.backends()
        ],
        "simd": _backends.simd_level(),
        "simd_from_memory": _backends.simd_level_from_memory(),
        "last_level_cache_bytes": _backends.cache_bytes(),
        "non_temporal_threshold_bytes": _backends.non_temporal_threshold(),
        "torch": str(torch.__version__),
        "cuda": {
            "available": torch.cuda.is_available(),
            "version": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as an aligned two-column table."""
    rows = [("rst_fused", facts["version"])]
    build = facts["build"] or {"C++ extension": "not built: pure Python"}
    rows += [(f"build: {key}", value) for key, value in build.items()]
    for backend in facts["backends"]:
        state = "available" if backend["available"] else "not available"
        rows.append((f"backend: {backend['name']}", f"{state}: {backend['reason']}"))
    rows += [
        ("SIMD", simd_line(facts)),
        *cache_rows(facts),
        ("torch", facts["torch"]),
        ("CUDA", cuda_line(facts["cuda"])),
        ("threads", str(facts["threads"])),
        ("Python", f"{facts['python']} ({facts['executable']})"),
        ("platform", facts["platform"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def simd_line(facts: dict[str, Any]) -> str:
    level, from_memory = facts["simd"], facts["simd_from_memory"]
    return level if level == from_memory else f"{level}; {from_memory} for fp32 and fp64 data larger than the caches"


def cache_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cache, threshold = facts["last_level_cache_bytes"], facts["non_temporal_threshold_bytes"]
    if cache is None:
        return []
    when = "for all data" if threshold == 0 else f"beyond {threshold / 2**20:g} MiB of data"
    stores = f"{when if threshold < 2**62 else 'never'} (RST_FUSED_NON_TEMPORAL_THRESHOLD)"
    return [("cache", f"{cache / 2**20:g} MiB, last level"), ("non-temporal stores", stores)]


def cuda_line(cuda: dict[str, Any]) -> str:
    if cuda["version"] is None:
        return "not available: this torch was built without CUDA"
    if not cuda["available"]:
        return f"not available: torch was built with CUDA {cuda['version']} but finds no device"
    return f"{cuda['version']}: {', '.join(cuda['devices'])}"
