"""Runs a function on several ranks: processes of torch.distributed with gloo, new ones for every call.

They are forked from a server that has imported torch once, so that a world of two starts in half a second.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "rst_fused", "pytest"]
)


class RankError(Exception):
    """What went wrong, by rank: the traceback of an exception, a signal, or where a rank was when time was up."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))
        self.errors = errors


def run(size: int, function: Callable[..., Any], *args: Any, seconds: float = 120, **kwargs: Any) -> list[Any]:
    """The results of ``function(*args, **kwargs)``, one for each rank. The function is one that can be imported.

    Raises RankError if any rank raised, died, or was not done after so many ``seconds``; no process outlives the call.
    """
    results, errors = outcomes(size, function, *args, seconds=seconds, **kwargs)
    if errors:
        raise RankError(errors)
    return [results[rank] for rank in range(size)]


def outcomes(
    size: int, function: Callable[..., Any], *args: Any, seconds: float = 120, **kwargs: Any
) -> tuple[dict[int, Any], dict[int, str]]:
    """Results by rank, and errors by rank: for tests in which ranks are meant to fail."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = pickle.dumps((function, args, kwargs))
    receivers: dict[Any, int] = {}
    processes = []
    for rank in range(size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_work, args=(rank, size, store.port, job, sender, seconds), daemon=True)
        process.start()
        sender.close()
        receivers[receiver] = rank
        processes.append(process)
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    try:
        while receivers:
            ready = multiprocessing.connection.wait(list(receivers), max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.update({rank: f"not done after {seconds} s" for rank in receivers.values()})
                break
            for receiver in ready:
                rank = receivers.pop(receiver)
                try:
                    failed, value = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    processes[rank].join(5)
                    code = processes[rank].exitcode
                    name = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
                    failed, value = True, f"ended without a result: {name}"
                (errors if failed else results)[rank] = value
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results, errors


def _work(rank: int, size: int, port: int, job: bytes, sender: Any, seconds: float) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    faulthandler.dump_traceback_later(seconds * 0.9, exit=False)  # for whoever looks for the reason of a hang
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=max(5.0, seconds * 0.7))
        )
        function, args, kwargs = pickle.loads(job)
        sender.send_bytes(pickle.dumps((False, function(*args, **kwargs))))
    except BaseException:
        sender.send_bytes(pickle.dumps((True, traceback.format_exc())))
        os._exit(1)  # at once, as a rank that died: the end of a process group may wait for the others
    faulthandler.cancel_dump_traceback_later()
    time.sleep(seconds)  # until it is killed: other ranks may still be reading what it has sent
