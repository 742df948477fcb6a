"""Throwaway database servers that a test may freeze, kill and start again. Linux only.

Each runs on a free port of 127.0.0.1 with its data in a temporary directory. Both are gone when the server is closed,
and also when the test run is killed. What is acknowledged is on the disk, as in production: no setting that makes a
server lose writes is changed.
"""

# ruff: noqa: S603 - what is run are the programs named here, with arguments made here

import atexit
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple, Self, TypedDict

from fastapi_building_blocks.testing.fault_proxy import free_port

_LOCALHOST = "127.0.0.1"
_START_SECONDS = 30.0
_STOP_SECONDS = 20.0
_PREPARE_SECONDS = 120.0
_LOOK_AGAIN = 0.01

# Reads a pipe that the test run holds open. Each line has the processes that must not outlive the run. A PostgreSQL that
# was killed leaves the segment of System V shared memory that guards its data; its lock file has the number.
_WATCH = """
while read -r line; do pids=$line; done
[ -n "$pids" ] && kill -KILL $pids 2>/dev/null && sleep 1
lock="$1/data/postmaster.pid"
[ -f "$lock" ] && ipcrm -m "$(sed -n '7s/.* //p' "$lock")"
rm -rf -- "$1"
"""


class MissingServer(Exception):  # noqa: N818 - a reason to skip a test, no error of the service
    """A server cannot be started here; the message says what to install."""


class DatabaseServer(ABC):
    """A database server of a test's own, and what may happen to it.

    ::

        with PostgreSQLServer() as server:
            async with SQLAlchemySession(server.url) as session:
                server.freeze()

    The methods block until what they promise is done. ``freeze``, ``thaw`` and ``kill`` take milliseconds; start again
    by ``await asyncio.to_thread(server.start)`` where an event loop has to go on meanwhile.

    Args:
        settings: the server's own settings, by name; they come last and win.
    """

    installs: ClassVar[str]
    """What to install, where it is missing."""
    _ready: ClassVar[bytes]
    """What the server writes to its log when it takes connections."""
    _stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        self.host = _LOCALHOST
        self.port = free_port()
        self._settings = dict(settings or {})
        self._place: _Place | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL of an empty database on it, for ``SQLAlchemySession``; it stays the same after a restart."""

    @property
    def alive(self) -> bool:
        """Whether it runs; a frozen server does."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has written to its log."""
        return "" if self._place is None else (self._place.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, with the data that it had, and wait until it takes connections.

        Raises:
            MissingServer: its programs are not installed.
            RuntimeError: it runs already, or did not start; the message has the end of its log.
        """
        if self.alive:
            raise RuntimeError(f"{type(self).__name__} runs already")
        if not Path("/proc/self/stat").exists():
            raise MissingServer("throwaway servers need Linux")
        if self._place is None:
            self._place = _Place()
            atexit.register(self.close)
            try:
                self._prepare(self._place.directory)
            except BaseException:
                self.close()
                raise
        directory, user = self._place.directory, self._user()
        with (directory / "log").open("ab") as log:
            seen = log.tell()
            self._process = subprocess.Popen(
                self._command(directory),
                cwd=directory,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **_as(user),
            )
        self._hold(self._process.pid)
        self._wait_until_ready(directory / "log", seen)

    def stop(self) -> None:
        """Shut it down in good order, without waiting for its clients; its data stays. Nothing, if it does not run."""
        if not self.alive or self._process is None:
            return
        self.thaw()
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._hold()

    def kill(self) -> None:
        """End every process of it at once (SIGKILL), as a crash or an OOM killer would; its data stays."""
        if self._process is None:
            return
        pids = self._freeze_all()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        give_up = time.monotonic() + _STOP_SECONDS
        while any(map(_lives, pids)) and time.monotonic() < give_up:
            time.sleep(
                _LOOK_AGAIN
            )  # one that writes to the disk ends after that, and may hold on to the data till then
        self._hold()

    def restart(self) -> None:
        """Stop it, if it runs, and start it on the same port with the same data."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop every process of it from running (SIGSTOP): its connections stay open, and nothing answers."""
        pids = self._freeze_all()
        self._hold(*pids)
        give_up = time.monotonic() + _STOP_SECONDS
        # A thread that runs on another processor goes on for some milliseconds, and may answer.
        while not all(map(_stands_still, pids)) and time.monotonic() < give_up:
            time.sleep(_LOOK_AGAIN / 10)

    def thaw(self) -> None:
        """Let a frozen server run on; one that is not frozen just runs."""
        if self._process is None or not self.alive:
            return
        for pid in _tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._hold(self._process.pid)

    def close(self) -> None:
        """End it and remove its data."""
        self.kill()
        place, self._place, self._process = self._place, None, None
        if place is not None:
            place.close()
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # What differs between servers

    @abstractmethod
    def _prepare(self, directory: Path) -> None:
        """Put the data of an empty server into its directory."""

    @abstractmethod
    def _command(self, directory: Path) -> list[str]:
        """Return the command that runs the server in the foreground."""

    def _user(self) -> "_User | None":
        """Return the user to run as; None is the present one."""
        return None

    # Processes

    def _wait_until_ready(self, log: Path, seen: int) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while True:
            written = log.read_bytes()[seen:]
            if self._ready in written:
                return
            if not self.alive or time.monotonic() > give_up:
                was_alive = self.alive
                self.kill()
                end = written[-2000:].decode(errors="replace")
                how = f"did not start within {_START_SECONDS:.0f} s" if was_alive else "ended while it started"
                raise RuntimeError(f"{type(self).__name__} {how}; its log:\n{end}")
            time.sleep(_LOOK_AGAIN)

    def _freeze_all(self) -> list[int]:
        """Freeze every process, and return them; the first one first, so that it starts no others meanwhile."""
        if self._process is None or not self.alive:
            return []
        self._process.send_signal(signal.SIGSTOP)
        pids = _tree(self._process.pid)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return pids

    def _hold(self, *pids: int) -> None:
        """Say which processes have to end with the test run."""
        if self._place is not None:
            self._place.hold(pids)


class PostgreSQLServer(DatabaseServer):
    """A PostgreSQL server with the superuser ``postgres`` and no password. Run by root, it becomes another user."""

    installs = "`apt install postgresql`"
    _ready = b"database system is ready to accept connections"
    _stop_signal = signal.SIGINT  # "fast": SIGTERM would wait for the clients

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@{self.host}:{self.port}/postgres"

    def _prepare(self, directory: Path) -> None:
        shutil.copytree(_postgresql_template().directory / "data", directory / "data")
        if (user := self._user()) is not None:
            _give(directory, user)

    def _command(self, directory: Path) -> list[str]:
        settings = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # in the data directory, so that a killed server leaves none behind
        } | self._settings
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [_postgresql_program("postgres"), "-D", str(directory / "data"), *options]

    def _user(self) -> "_User | None":
        return _not_root()


class PostgreSQLReplica(PostgreSQLServer):
    """A streaming replica of a PostgreSQL server, a hot standby; the superuser and its databases are the primary's.

    ::

        with PostgreSQLServer() as primary, PostgreSQLReplica(primary, delay=5.0) as replica:
            ...

    It keeps a replication slot on the primary, so that it catches up after it was stopped.

    Args:
        primary: the server that it replays; it runs while the replica is started the first time.
        delay: seconds by which every commit is replayed late; ``pause`` and ``resume`` stop and go on at will.
    """

    _ready = b"database system is ready to accept read-only connections"

    def __init__(
        self, primary: PostgreSQLServer, settings: Mapping[str, object] | None = None, *, delay: float = 0.0
    ) -> None:
        # A standby refuses to run with less than its primary has.
        inherited = {name: value for name, value in primary._settings.items() if name in _STANDBY_NEEDS}
        super().__init__(inherited | {"recovery_min_apply_delay": f"{delay * 1000:.0f}ms"} | dict(settings or {}))
        self._primary = primary

    def _prepare(self, directory: Path) -> None:
        if (user := self._user()) is not None:
            _give(directory, user)
        source = ["-h", self._primary.host, "-p", str(self._primary.port), "-U", "postgres"]
        backup = [_postgresql_program("pg_basebackup"), *source, "-D", str(directory / "data"), "--checkpoint=fast"]
        _run([*backup, "--no-sync", "-R", "-C", "-S", f"replica_{self.port}"], user)

    def pause(self) -> None:
        """Replay nothing from here on; what the primary writes is still received."""
        self._ask("SELECT pg_wal_replay_pause()")
        give_up = time.monotonic() + _START_SECONDS
        while self._ask("SELECT pg_get_wal_replay_pause_state()") != "paused" and time.monotonic() < give_up:
            time.sleep(_LOOK_AGAIN)

    def resume(self) -> None:
        """Replay again, and all that has come meanwhile."""
        self._ask("SELECT pg_wal_replay_resume()")

    def promote(self) -> None:
        """Make it a primary of its own, which takes writes and replays no other's."""
        self._ask("SELECT pg_promote()")

    def _ask(self, sql: str) -> str:
        place = ["-h", self.host, "-p", str(self.port), "-U", "postgres", "-d", "postgres"]
        give_up = time.monotonic() + _START_SECONDS
        while True:
            try:
                return _run([_postgresql_program("psql"), *place, "-X", "-A", "-t", "-c", sql], None).strip()
            except RuntimeError as error:
                # Replay ends what is in its way, after max_standby_streaming_delay.
                if "conflict with recovery" not in str(error) or time.monotonic() > give_up:
                    raise


_STANDBY_NEEDS = ("max_connections", "max_worker_processes", "max_wal_senders", "max_locks_per_transaction")


class MariaDBServer(DatabaseServer):
    """A MariaDB server with an empty database ``test``, for ``root`` without a password."""

    installs = "`apt install mariadb-server`"
    _ready = b"ready for connections"

    @property
    def url(self) -> str:
        return f"mysql+aiomysql://root@{self.host}:{self.port}/test"

    def _prepare(self, directory: Path) -> None:
        shutil.copytree(_mariadb_template().directory / "data", directory / "data")
        (directory / "tmp").mkdir()

    def _command(self, directory: Path) -> list[str]:
        settings = {
            "datadir": directory / "data",
            "tmpdir": directory / "tmp",  # a server that starts removes others' temporary tables from a shared one
            "bind-address": self.host,
            "port": self.port,
            "socket": directory / "socket",
            "pid-file": directory / "pid",
            "character-set-server": "utf8mb4",
            "innodb-log-file-size": _MARIADB_LOG_SIZE,
            "innodb-buffer-pool-size": "64M",
            "skip-name-resolve": "ON",
            **_MARIADB_LOG_BY_WRITES,
        } | self._settings
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [_mariadb_server(), "--no-defaults", *_mariadb_user(), *options]


class MariaDBReplica(MariaDBServer):
    """A replica of a MariaDB server by global transaction ids (GTID), read-only for all but administrators.

    ::

        with MariaDBServer(MARIADB_PRIMARY) as primary, MariaDBReplica(primary, delay=5) as replica:
            ...

    The primary needs a binary log since it was made: its settings include ``MARIADB_PRIMARY``.

    Args:
        primary: the server that it replays; it runs while the replica is started the first time.
        delay: seconds by which every transaction is replayed late; ``pause`` and ``resume`` stop and go on at will.
    """

    def __init__(self, primary: MariaDBServer, settings: Mapping[str, object] | None = None, *, delay: int = 0) -> None:
        super().__init__(settings)
        self._settings = {"server-id": self.port, "read-only": "ON"} | self._settings
        self._primary = primary
        self._delay = delay
        self._follows = False

    def start(self) -> None:
        super().start()
        if not self._follows:
            self._follows = True
            source = f"MASTER_HOST='{self._primary.host}', MASTER_PORT={self._primary.port}, MASTER_USER='root'"
            how = f"MASTER_USE_GTID=slave_pos, MASTER_DELAY={self._delay}, MASTER_CONNECT_RETRY=1"
            self._ask(f"CHANGE MASTER TO {source}, {how}; START SLAVE")

    def pause(self) -> None:
        """Replay nothing from here on; what the primary writes is still received."""
        self._ask("STOP SLAVE SQL_THREAD")

    def resume(self) -> None:
        """Replay again, and all that has come meanwhile."""
        self._ask("START SLAVE SQL_THREAD")

    def promote(self) -> None:
        """Make it a primary of its own, which takes writes and replays no other's."""
        self._ask("STOP SLAVE; RESET SLAVE ALL; SET GLOBAL read_only = OFF")

    def _ask(self, sql: str) -> str:
        place = ["--protocol=tcp", f"--host={self.host}", f"--port={self.port}", "--user=root", "--skip-column-names"]
        return _run([_program("mariadb", self.installs), "--no-defaults", *place, f"--execute={sql}"], None).strip()


MARIADB_PRIMARY: Mapping[str, object] = {"log-bin": "binlog", "server-id": 1, "binlog-format": "ROW"}
"""The settings of a ``MariaDBServer`` that replicas can follow."""


class RedisServer(DatabaseServer):
    """A Redis server that keeps nothing when it is stopped, as a cache; ``settings`` may say otherwise."""

    installs = "`apt install redis-server`"
    _ready = b"Ready to accept connections"

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def _prepare(self, directory: Path) -> None:
        _program("redis-server", self.installs)

    def _command(self, directory: Path) -> list[str]:
        settings = {
            "bind": self.host,
            "port": self.port,
            "dir": directory,
            "save": "",
            "appendonly": "no",
        } | self._settings
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        return [_program("redis-server", self.installs), *options]


class RedisSentinelServer(DatabaseServer):
    """A Sentinel that watches a Redis server and its replicas under the name ``service``, alone: its quorum is 1.

    Args:
        primary: the server to watch; it is started and closed by whoever made it.
        settings: of the watched service, for example ``{"down-after-milliseconds": 500}``.
    """

    installs = "`apt install redis-server`"
    _ready = b"+monitor master"

    def __init__(self, primary: RedisServer, settings: Mapping[str, object] | None = None) -> None:
        super().__init__(settings)
        self._primary = primary

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.host}:{self.port}/service/0"

    def _prepare(self, directory: Path) -> None:
        _program("redis-server", self.installs)
        lines = [f"bind {self.host}", f"port {self.port}", f"dir {directory}"]
        lines.append(f"sentinel monitor service {self._primary.host} {self._primary.port} 1")
        lines += [f"sentinel {name} service {value}" for name, value in self._settings.items()]
        (directory / "conf").write_text("\n".join([*lines, ""]))

    def _command(self, directory: Path) -> list[str]:
        return [_program("redis-server", self.installs), str(directory / "conf"), "--sentinel"]


class PgBouncerServer(DatabaseServer):
    """PgBouncer in transaction mode in front of a PostgreSQL server, with its own defaults otherwise.

    Args:
        postgresql: the server behind it; it is started and closed by whoever made it.
        settings: of the section ``[pgbouncer]``, for example ``{"default_pool_size": 2}``.
    """

    installs = "`apt install pgbouncer`"
    _ready = b"process up"

    def __init__(self, postgresql: PostgreSQLServer, settings: Mapping[str, object] | None = None) -> None:
        super().__init__(settings)
        self._postgresql = postgresql

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@{self.host}:{self.port}/postgres"

    def _prepare(self, directory: Path) -> None:
        _program("pgbouncer", self.installs)
        settings = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "pool_mode": "transaction",
            "auth_type": "trust",
            "auth_file": directory / "users",
            "admin_users": "postgres",
        } | self._settings
        lines = [f"{name} = {value}" for name, value in settings.items()]
        behind = f"* = host={self._postgresql.host} port={self._postgresql.port}"
        (directory / "ini").write_text("\n".join(["[databases]", behind, "[pgbouncer]", *lines, ""]))
        (directory / "users").write_text('"postgres" ""\n')
        if (user := self._user()) is not None:
            _give(directory, user)

    def _command(self, directory: Path) -> list[str]:
        return [_program("pgbouncer", self.installs), str(directory / "ini")]

    def _user(self) -> "_User | None":
        return _not_root()


_MARIADB_LOG_SIZE = "16M"
_MARIADB_LOG_BY_WRITES: Mapping[str, object] = {
    "loose-innodb-log-file-buffering": "ON",
    "loose-innodb-log-file-mmap": "OFF",
}
"""How a MariaDB that is killed has to keep its log, to come back right: through the file system's cache.

With its defaults (written past that cache, read through a mapping) 10.11.19 kept half a transaction, or did not start, in 6 of
164 runs of 20 kills, though each transaction had come whole over one connection; with these in 0 of 136. What is
acknowledged is on the disk either way. An older server leaves out what it does not know.
"""


class _Place:
    """A directory that is gone, and processes that are killed, when this process ends, however it ends."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fastapi-building-blocks-"))
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watcher", str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the test run
        )
        atexit.register(self._watcher.communicate)

    def hold(self, pids: Sequence[int]) -> None:
        """Say which processes are to be killed, instead of those said before."""
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(f"{' '.join(map(str, pids))}\n".encode())
        self._watcher.stdin.flush()

    def close(self) -> None:
        """Remove the directory, and kill the processes that are held."""
        self._watcher.communicate()
        atexit.unregister(self._watcher.communicate)


@functools.cache
def _postgresql_template() -> _Place:
    """Return a place with the data of a new cluster, made once in a process and copied for each server."""
    initdb, user = _postgresql_program("initdb"), _not_root()
    place = _Place()
    if user is not None:
        _give(place.directory, user)
    make = [initdb, "-D", str(place.directory / "data"), "--no-sync"]
    _run([*make, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"], user)
    return place


@functools.cache
def _mariadb_template() -> _Place:
    """The same for MariaDB."""
    _mariadb_server()
    installer = _program("mariadb-install-db", MariaDBServer.installs)
    place = _Place()
    data, tmp = place.directory / "data", place.directory / "tmp"
    tmp.mkdir()
    install = [installer, "--no-defaults", f"--datadir={data}", f"--tmpdir={tmp}", *_mariadb_user()]
    _run([*install, "--auth-root-authentication-method=normal", f"--innodb-log-file-size={_MARIADB_LOG_SIZE}"], None)
    return place


def _postgresql_program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs: that of the newest version, where PATH has none."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: _number(path.parts[-3]))
    found = shutil.which(name) or (str(versions[-1]) if versions else "")
    return found or _program(name, PostgreSQLServer.installs)


def _number(version: str) -> float:
    try:
        return float(version)
    except ValueError:
        return 0.0


def _mariadb_server() -> str:
    return _program("mariadbd", MariaDBServer.installs)


def _mariadb_user() -> list[str]:
    return ["--user=root"] if os.geteuid() == 0 else []


def _program(name: str, installs: str) -> str:
    """Return the path of a program. Debian's servers are in sbin, which users do not have in their PATH."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingServer(f"no program {name}: {installs}")
    return found


class _User(NamedTuple):
    """A user and its group, by number."""

    uid: int
    gid: int


class _RunAs(TypedDict, total=False):
    """What ``subprocess`` calls them."""

    user: int
    group: int
    extra_groups: list[int]


def _as(user: _User | None) -> _RunAs:
    return {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}


def _not_root() -> _User | None:
    """Return the user that a server runs as which refuses root, or None where we are not root."""
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - this package is imported on Windows as well

    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _User(entry.pw_uid, entry.pw_gid)
    raise MissingServer("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


def _give(directory: Path, user: _User) -> None:
    """Make a directory and all that is in it the user's."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, user.uid, user.gid)


def _run(command: Sequence[str], user: _User | None) -> str:
    done = subprocess.run(
        command,
        env=_environment(),
        cwd="/",
        **_as(user),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_PREPARE_SECONDS,
        check=False,
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:].decode(errors="replace")
        raise RuntimeError(f"{command[0]} failed:\n{said}")
    return done.stdout.decode()


def _environment() -> dict[str, str]:
    """Return the environment without what would change a server's or an installer's mind, and messages in English."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MYSQL", "MARIADB"))}
    return ours | {"LC_ALL": "C"}


def _tree(root: int) -> list[int]:
    """Return a process and all that descend from it, as they are now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                children.setdefault(int(_status(int(entry.name))[1]), []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, ()))
    return tree


def _stands_still(pid: int) -> bool:
    """Whether no thread of the process runs: all are stopped, or it is gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return all(
            (task / "stat").read_text().rpartition(")")[2].split()[0] in "TZX"
            for task in Path(f"/proc/{pid}/task").iterdir()
        )
    return True


def _lives(pid: int) -> bool:
    """Whether there is such a process, and not only what is left of it until its parent has taken note."""
    try:
        return _status(pid)[0] not in "ZX"
    except OSError:
        return False


def _status(pid: int) -> list[str]:
    """Return a process's state, its parent, and more; they follow its name in brackets, which may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
