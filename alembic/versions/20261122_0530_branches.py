"""Branches and forks of conversations, and a name to list conversations by."""

from __future__ import annotations

from alembic import op

revision = "c41b7e92d6f0"
down_revision = "8d2f0c61a7e3"
branch_labels = None
depends_on = None

COLUMNS = """
ALTER TABLE conversations
    ADD COLUMN scope varchar(255),
    ADD COLUMN is_branched boolean NOT NULL DEFAULT false,
    ADD COLUMN is_shared boolean NOT NULL DEFAULT false,
    ADD COLUMN forked_at_id uuid;
"""

# The next revision validates it, without keeping anybody from reading or writing.
KEY = """
ALTER TABLE conversations
    ADD CONSTRAINT fk_conversations_forked_at_id FOREIGN KEY (tenant_id, forked_at_id)
    REFERENCES messages (tenant_id, id) ON DELETE SET NULL (forked_at_id) NOT VALID;
"""

# Before, nothing of ours set these links; where somebody did, the head is kept from now on.
BRANCHED = """
UPDATE conversations
SET is_branched = true, head_id = coalesce(head_id, (
    SELECT id FROM messages
    WHERE messages.tenant_id = conversations.tenant_id
        AND messages.conversation_id = conversations.id
    ORDER BY position DESC LIMIT 1))
WHERE head_id IS NOT NULL OR (tenant_id, id) IN (
    SELECT tenant_id, conversation_id FROM messages WHERE parent_id IS NOT NULL);
"""


def upgrade() -> None:
    for statement in (COLUMNS, KEY, BRANCHED):
        op.execute(statement)


def downgrade() -> None:
    op.execute("""
        ALTER TABLE conversations
            DROP COLUMN forked_at_id,
            DROP COLUMN is_shared,
            DROP COLUMN is_branched,
            DROP COLUMN scope
    """)
