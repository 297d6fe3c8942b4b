"""A network on one machine: a TCP proxy in its own process that delays every byte by a fixed time.

It also counts round trips: how often a client sent something after it had been answered.
"""

from __future__ import annotations

import multiprocessing
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Proxy", "delaying"]

_SPIN_SECONDS = 0.0001  # select() wakes up to 0.06 ms late
_CHUNK = 1 << 20


class Proxy:
    """What the measuring process knows of the proxy."""

    def __init__(self, port: int, trips: Any) -> None:
        self.port = port
        self._trips = trips

    def trips(self) -> int:
        """Return how many round trips there have been so far."""
        return int(self._trips.value)


@contextmanager
def delaying(target: str, one_way: float) -> Iterator[Proxy]:
    """Run a proxy on 127.0.0.1 before a unix socket; each way takes `one_way` seconds."""
    spawn = multiprocessing.get_context("spawn")
    trips = spawn.Value("q", 0, lock=False)
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_serve, args=(target, one_way, trips, theirs), daemon=True)
    process.start()
    try:
        yield Proxy(ours.recv(), trips)
    finally:
        process.terminate()
        process.join()


def _serve(target: str, one_way: float, trips: Any, port: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port.send(listener.getsockname()[1])
    ends: dict[socket.socket, socket.socket] = {}
    clients: dict[socket.socket, bool] = {}  # whether it was answered since it last sent
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        patience = (
            max(0.0, waiting[0][0] - time.perf_counter() - _SPIN_SECONDS) if waiting else None
        )
        for source in select.select([listener, *ends], [], [], patience)[0]:
            if source is listener:
                client, server = listener.accept()[0], socket.socket(socket.AF_UNIX)
                server.connect(target)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ends[client], ends[server], clients[client] = server, client, True
                continue
            data = _received(source)
            if clients.get(source):
                trips.value += 1
                clients[source] = False
            waiting.append((time.perf_counter() + one_way, ends[source], data))
            if not data:
                del ends[source]
        while waiting and waiting[0][0] <= time.perf_counter():
            _, sink, data = waiting.popleft()
            if sink in clients:
                clients[sink] = True
            _deliver(sink, data)


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(_CHUNK)
    except OSError:
        return b""


def _deliver(sink: socket.socket, data: bytes) -> None:
    try:
        if data:
            sink.sendall(data)
        else:
            sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it has gone; its own end says so
