"""Work that tests wait for, started ahead of them: as much at a time as there are processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

Futures = dict[Any, Future[Any]]


@contextmanager
def side_by_side(jobs: Mapping[Hashable, Callable[[], Any]]) -> Iterator[Futures]:
    """Each job runs in a thread, which is of use where it waits for another process. What is not begun at the end is
    left out."""
    with ThreadPoolExecutor(os.cpu_count()) as several:
        yield {key: several.submit(job) for key, job in jobs.items()}
        several.shutdown(cancel_futures=True)


def chosen(request: pytest.FixtureRequest, test: str) -> list[dict[str, Any]]:
    """The parameters of this test of the module, once for each time that it is going to run."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    mine = [item for item in items if item.originalname == test and item.path == request.path]
    return [item.callspec.params if hasattr(item, "callspec") else {} for item in mine]
