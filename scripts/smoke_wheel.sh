#!/bin/sh
# Build the wheel, install it into an empty environment far from the checkout, and use it there.
set -eu
cd "$(dirname "$0")/.."
python=$(pwd)/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$work" # for root, whose server runs as another user

"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/dist" .
"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" --quiet --disable-pip-version-check \
    install "$(echo "$work"/dist/*.whl)[embedded,cli]"

project=$("$python" -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(p["name"], p["version"])')

mkdir "$work/elsewhere"
cd "$work/elsewhere"
for name in $(env | sed -n 's/^\(DATABASE_[A-Z_]*\)=.*/\1/p'); do
    unset "$name"
done
export DATABASE_DATA_DIR="$work/data"
"$work/venv/bin/python" -I - $project <<'PYTHON'
import sys
from importlib.metadata import version

import database
from database import (
    ConversationRepository,
    MessageRepository,
    UserRepository,
    close_db,
    get_db_session,
    init_db,
)

assert database.__file__.startswith(sys.prefix), database.__file__
name, built = sys.argv[1:]
assert version(name) == built, version(name)

init_db()
with get_db_session() as db:
    user = UserRepository.get_or_create(db, "a@example.com")
    conversation = ConversationRepository.create(db, user_id=user.id, title="t")
    MessageRepository.append(db, conversation.id, role="user", content="hi")
    history = MessageRepository.history(db, conversation.id)
    assert [message.content for message in history] == ["hi"]
close_db()
PYTHON
unset PYTHONPATH
for command in "users show a@example.com" "history export --user a@example.com" \
    "downgrade base --yes" upgrade check doctor; do
    "$work/venv/bin/database" $command >/dev/null
done
echo "$project: built, installed and used"
