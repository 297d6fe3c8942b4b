"""The key of forks, and indexes of branches, forks and scopes, made beside everybody's work."""

from __future__ import annotations

from alembic import op

revision = "e9a05d3c7b18"
down_revision = "c41b7e92d6f0"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_messages_branches": (
        "messages (tenant_id, conversation_id, position) WHERE parent_id IS NOT NULL"
    ),
    "ix_conversations_forked_at_id": (
        "conversations (tenant_id, forked_at_id) WHERE forked_at_id IS NOT NULL"
    ),
    "ix_conversations_scope_updated_at_id": (
        "conversations (tenant_id, scope, updated_at, id) WHERE scope IS NOT NULL"
    ),
}

KEY = "fk_conversations_forked_at_id"
# It may be run again.
VALIDATE = f"""
-- squawk-ignore prefer-robust-stmts
ALTER TABLE conversations VALIDATE CONSTRAINT {KEY}
"""
NOT_VALIDATED = f"""
ALTER TABLE conversations
    DROP CONSTRAINT {KEY},
    ADD CONSTRAINT {KEY} FOREIGN KEY (tenant_id, forked_at_id)
    REFERENCES messages (tenant_id, id) ON DELETE SET NULL (forked_at_id) NOT VALID
"""


def upgrade() -> None:
    op.execute(VALIDATE)
    with op.get_context().autocommit_block():
        for name, definition in INDEXES.items():
            # What an interrupted run has left is no index yet.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {definition}")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name in reversed(INDEXES):
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
        op.execute(NOT_VALIDATED)
