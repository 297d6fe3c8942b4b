"""Render each revision's SQL to a file of its own, as it runs: one transaction a revision."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory

from database.schema import alembic_config
from database.settings import Settings


def main(folder: Path) -> None:
    """Write the files, the oldest revision first by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.sql"):
        old.unlink()
    revisions = reversed(list(ScriptDirectory.from_config(alembic_config()).walk_revisions()))
    for number, script in enumerate(revisions, 1):
        output = io.StringIO()
        config = alembic_config(Settings(environment="production", _env_file=None), output)
        span = f"{script.down_revision or 'base'}:{script.revision}"
        command.upgrade(config, span, sql=True)
        (folder / f"{number:03}_{script.revision}.sql").write_text(output.getvalue())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
