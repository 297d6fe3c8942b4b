"""Behind a real PgBouncer that pools by transaction, as clouds put in front of their databases."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import make_url

import database
from database import (
    ConversationRepository,
    MessageRepository,
    SessionLocal,
    UserRepository,
    transaction,
)

# Debian puts it where only root's PATH leads.
PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

pytestmark = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")

CONFIGURATION = """
[databases]
{name} = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
auth_type = any
pool_mode = transaction
default_pool_size = 3
unix_socket_dir =
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_open(port: int) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("pgbouncer did not start")


@pytest.fixture
def bouncer_url(worker_url: str) -> Iterator[str]:
    url = make_url(worker_url)
    host = url.host or str(url.query["host"])
    listen = free_port()
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    file = folder / "pgbouncer.ini"
    file.write_text(
        CONFIGURATION.format(
            name=url.database,
            host=host,
            port=url.port or url.query.get("port", 5432),
            user=url.username,
            listen=listen,
        )
    )
    # It refuses to be root; the embedded server's socket lets only the server's own user in.
    owner = Path(host).stat().st_uid if host.startswith("/") else 65534
    process = subprocess.Popen(
        [str(PGBOUNCER), "-q", file], user=owner if os.getuid() == 0 else None, cwd="/"
    )
    try:
        wait_until_open(listen)
        yield f"postgresql://{url.username}@127.0.0.1:{listen}/{url.database}"
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder)


def test_many_clients_share_few_connections(bouncer_url: str, tenant: str) -> None:
    database.configure(url=bouncer_url, pool_size=8, prepare_threshold=None)
    with SessionLocal(tenant_id=tenant) as db:
        conversation = ConversationRepository.create(db)

    def work(number: int) -> None:
        own = f"{tenant}-{number}"
        with SessionLocal(tenant_id=tenant) as db, SessionLocal(tenant_id=own) as elsewhere:
            for _ in range(25):
                MessageRepository.append(db, conversation.id, role="user", content="hello")
                with transaction(elsewhere):
                    UserRepository.create(elsewhere)
                    UserRepository.create(elsewhere)
                assert MessageRepository.history(elsewhere, conversation.id) == []
            assert UserRepository.count(elsewhere) == 50

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    with SessionLocal(tenant_id=tenant) as db:
        positions = [m.position for m in MessageRepository.iterate(db, conversation.id)]
        assert positions == list(range(1, 201))
        assert UserRepository.count(db) == 0
