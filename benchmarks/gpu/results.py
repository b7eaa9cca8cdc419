"""What a run leaves: its report, its numbers, and everything else in one archive, so few files of bounded size."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

MOST_BYTES = 15 << 20  # of the archive
LEFT_OUT = "left-out.txt"


def _archive(paths: list[Path], folder: Path, left_out: list[str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for path in paths:
            archive.add(path, str(path.relative_to(folder)))
        if left_out:
            words = "".join(f"{line}\n" for line in left_out).encode()
            entry = tarfile.TarInfo(LEFT_OUT)
            entry.size = len(words)
            archive.addfile(entry, io.BytesIO(words))
    return made.getvalue()


def pack(folder: Path, target: Path, most: int = MOST_BYTES) -> list[str]:
    """Puts all files of ``folder`` into the archive ``target``. Those that make it too large are left out, the largest
    first; they are named in it, and returned."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".draft"))
    by_size = sorted(paths, key=lambda path: path.stat().st_size)
    left_out: list[str] = []
    made = _archive(paths, folder, left_out)
    while len(made) > most and by_size:
        largest = by_size.pop()
        paths.remove(largest)
        left_out.append(f"{largest.relative_to(folder)}: {largest.stat().st_size} bytes")
        made = _archive(paths, folder, left_out)
    draft = target.with_name(target.name + ".draft")
    draft.write_bytes(made)
    draft.replace(target)
    return left_out
