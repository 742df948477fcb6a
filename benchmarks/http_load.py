"""The HTTP part: one row and 100 rows through uvicorn, asked for over 32 connections that are kept alive."""

import argparse
import asyncio
import itertools
import json
import os
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from .accounts import PAGE_SIZE, STATUSES, Account, account, table
from .databases import CONTESTANTS, Housekeeping, private_database
from .http_apps import HTTP_CONTESTANTS, AccountOut, HttpContestant
from .measure import on_one_core, pin
from .operations import WrongAnswerError

CONNECTIONS = 32
SECONDS = 2.0
OPERATIONS = ("one row", "100 rows")
ROOT = Path(__file__).parents[1]


# The servers


class Server:
    """One contestant behind uvicorn, in a process of its own."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.contestant: HttpContestant = HTTP_CONTESTANTS[name]
        with socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS * 4) as listening:
            self.port: int = listening.getsockname()[1]
            command = [sys.executable, "-m", "benchmarks.http_apps", name, url, str(listening.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[listening.fileno()])
        pin(1, self._process.pid)

    def cpu(self) -> float:
        """Return the seconds of CPU that the process has used, or 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def running(name: str, url: str) -> Iterator[Server]:
    server = Server(name, url)
    try:
        yield server
    finally:
        server.stop()


# The load


def requests_for(contestant: HttpContestant, operation: str, rows: int) -> Iterator[bytes]:
    """Yield requests without end: random accounts, or the newest of each status in turn."""
    if operation == "one row":
        chosen = random.Random(rows)  # the same accounts for everybody
        targets = iter(lambda: f"/accounts/{chosen.randint(1, rows)}", None)
    else:
        targets = itertools.cycle(contestant.page.format(status=status) for status in STATUSES)
    for target in targets:
        yield f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n\r\n".encode()


class Connection:
    """A kept-alive connection that asks again as soon as it has a whole answer."""

    def __init__(self, port: int, requests: Iterator[bytes]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._requests = requests
        self._parts: list[bytes] = []
        self._missing: int | None = None
        """Bytes of the answer that is arriving; None until its head has arrived."""

    def ask(self) -> None:
        self.socket.sendall(next(self._requests))

    def receive(self) -> bytes | None:
        """Take what has arrived; the whole answer if that was its end.

        Raises:
            WrongAnswerError: not a 200.
        """
        part = self.socket.recv(262_144)
        if not part:
            raise WrongAnswerError("the server has closed the connection")
        self._parts.append(part)
        if self._missing is None:
            head, end, body = b"".join(self._parts).partition(b"\r\n\r\n")
            if not end:
                return None
            if not head.startswith(b"HTTP/1.1 200"):
                raise WrongAnswerError(f"{head.decode()} {body.decode(errors='replace')}")
            length = head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            self._missing = int(length) - len(body)
        else:
            self._missing -= len(part)
        if self._missing:
            return None
        answer = b"".join(self._parts)
        self._parts, self._missing = [], None
        return answer


def load(server: Server, operation: str, rows: int, seconds: float) -> tuple[int, float, float]:
    """Keep every connection asking for this long, and return requests, seconds, and seconds of the server's CPU."""
    requests = requests_for(server.contestant, operation, rows)
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        connections = [Connection(server.port, requests) for _ in range(CONNECTIONS)]
        for connection in connections:
            stack.callback(connection.socket.close)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        cpu, start = server.cpu(), time.perf_counter()
        answered, busy, end = 0, len(connections), start + seconds
        for connection in connections:
            connection.ask()
        while busy:
            ready = selector.select(30)
            if not ready:
                raise WrongAnswerError(f"{server.name} has not answered for 30 seconds")
            for key, _ in ready:
                if key.data.receive() is not None:
                    answered += 1
                    if time.perf_counter() < end:
                        key.data.ask()
                    else:
                        busy -= 1
        return answered, time.perf_counter() - start, server.cpu() - cpu


# The right answers


def newest(rows: int) -> dict[str, list[Account]]:
    """Return what a page of each status holds."""
    ordered = sorted(map(account, range(1, rows + 1)), key=lambda item: (item.created_at, item.id), reverse=True)
    return {status: [item for item in ordered if item.status == status][:PAGE_SIZE] for status in STATUSES}


def check(server: Server, operation: str, rows: int, pages: Mapping[str, list[Account]]) -> None:
    """Compare four answers with what is right.

    Raises:
        WrongAnswerError: naming contestant and operation.
    """
    requests = requests_for(server.contestant, operation, rows)
    for status in STATUSES:
        request = next(requests)
        right = [account(int(request.split()[1].rpartition(b"/")[2]))] if operation == "one row" else pages[status]
        found = _accounts(_ask(server, request), None if operation == "one row" else server.contestant.items)
        if found != right:
            raise WrongAnswerError(f"{server.name}, {operation}: {found[:1]} instead of {right[:1]}")


def _ask(server: Server, request: bytes) -> Any:
    connection = Connection(server.port, iter([request]))
    with connection.socket:
        connection.ask()
        while (answer := connection.receive()) is None:
            pass
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def _accounts(answer: Any, items: str | None) -> list[Account]:
    """Return what an answer holds: one account, a list of them, or one in an envelope."""
    found = answer[items] if items else answer
    return [
        Account(**AccountOut.model_validate(item).model_dump())
        for item in (found if isinstance(found, list) else [found])
    ]


# The run


async def run_http(
    database_urls: Mapping[str, str],
    rounds: int,
    say: Callable[[str], object],
    *,
    rows: int = 200_000,
    seconds: float = SECONDS,
    contestants: Sequence[str] = tuple(HTTP_CONTESTANTS),
) -> dict[str, Any]:
    """Measure contestants over HTTP on each database, in random order in each round.

    Args:
        database_urls: by ``postgres``, ``mysql`` and ``sqlite``. One without the table is filled first.
        say: is told a line at a time what happens.
        rows: how many there are or are to be, numbered from 1.
        seconds: of load for each contestant, operation and round.

    Returns:
        By database, operation and contestant: ``requests_per_second`` and ``cpu_microseconds`` (of the server's
        process, for a request) of each round, their medians, and ``times_core``, the median of the rounds' ratios of
        requests per second to those of hand-written Core.

    Raises:
        WrongAnswerError: before anything is measured.
    """
    pages = newest(rows)
    results = {}
    for name, url in database_urls.items():
        await _fill(name, url, rows)
        with ExitStack() as stack:
            stack.enter_context(on_one_core())  # the load; the servers have the other one
            servers = [stack.enter_context(running(contestant, url)) for contestant in contestants]
            measure = partial(_measure, rounds=rounds, say=say, rows=rows, seconds=seconds, pages=pages)
            results[name] = await asyncio.to_thread(measure, name, servers)
    return results


async def _fill(name: str, url: str, rows: int) -> None:
    engine = create_async_engine(url, poolclass=sa.NullPool)
    async with engine.connect() as connection:
        is_there = await connection.run_sync(lambda connection: sa.inspect(connection).has_table(table.name))
    await engine.dispose()
    if not is_there:
        house = Housekeeping(name, url, rows)
        await house.setup()
        await house.teardown()


def _measure(
    database: str,
    servers: Sequence[Server],
    *,
    rounds: int,
    say: Callable[[str], object],
    rows: int,
    seconds: float,
    pages: Mapping[str, list[Account]],
) -> dict[str, Any]:
    for server in servers:
        for operation in server.contestant.operations:
            if server.contestant.reads_the_database:
                check(server, operation, rows, pages)
            load(server, operation, rows, seconds / 4)  # warms up
    say(f"{database}: all answers are right")
    measured: dict[str, Any] = {}
    for operation in OPERATIONS:
        taking_part = [server for server in servers if operation in server.contestant.operations]
        cells = measured[operation] = {
            server.name: {"requests_per_second": [], "cpu_microseconds": []} for server in taking_part
        }
        for _ in range(rounds):
            for server in random.sample(taking_part, len(taking_part)):
                answered, took, cpu = load(server, operation, rows, seconds)
                cells[server.name]["requests_per_second"].append(answered / took)
                cells[server.name]["cpu_microseconds"].append(cpu / answered * 1e6)
        for cell in cells.values():
            cell["median"] = {name: statistics.median(values) for name, values in cell.items()}
            if "core" in cells:
                pairs = zip(cell["requests_per_second"], cells["core"]["requests_per_second"], strict=True)
                cell["times_core"] = statistics.median(own / core for own, core in pairs)
        say(f"{database}, {operation}:")
        for name, cell in cells.items():
            say(_line(name, cell))
    return measured


def _line(name: str, cell: Mapping[str, Any]) -> str:
    times = f"{cell['times_core']:6.2f} x core" if "times_core" in cell else ""
    median = cell["median"]
    return f"  {name:27} {median['requests_per_second']:8,.0f} requests/s {median['cpu_microseconds']:8,.0f} us CPU {times}"


async def _standalone(options: argparse.Namespace) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        urls = {name: await stack.enter_async_context(private_database(name)) for name in options.db.split(",")}
        found = {name: url for name, url in urls.items() if url is not None}
        return await run_http(
            found,
            options.rounds,
            partial(print, flush=True),
            rows=options.rows,
            seconds=options.seconds,
            contestants=options.contestants.split(","),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_load", description=__doc__)
    parser.add_argument("--db", default=",".join(CONTESTANTS), help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--rows", type=int, default=200_000, help="in the table; default %(default)s")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of load at a time; default %(default)s")
    parser.add_argument("--contestants", default=",".join(HTTP_CONTESTANTS), help="default %(default)s")
    parser.add_argument("--json", type=Path, help="where to leave everything that was measured")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers and private databases go away then too
    results = asyncio.run(_standalone(options))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
