"""`python -m database`: the same as the command `database`."""

from __future__ import annotations

from database.cli import main

main()
