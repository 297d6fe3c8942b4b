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

# As in the indexes ix_contexts_text and ix_messages_text.
UNSPACED = (
    r"[\u0E00-\u0EFF\u1000-\u11FF\u1780-\u17FF\u2E80-\u2FDF\u3005-\u3007\u3040-\u31FF"
    r"\u3400-\u4DBF\u4E00-\u9FFF\uAC00-\uD7FF\uF900-\uFAFF\uFF66-\uFF9F\U00020000-\U0003FFFF]"
)
JSON_SYNTAX = r'"(?:[^"\\]|\\.)*": |\\(?:.|u....)'

# Row-level security keeps `@@` and `~*` from every GIN index, for their functions are not
# leakproof. So the search runs as the tables' owner, and answers for the session's tenant alone.
#
# Hits are collected first: else the planner walks an index in the order asked for, and filters.
# Words have a branch for each index, where one plan serves all calls; without words the plan
# depends on what is given. Ranking parses texts again, so only the newest hits are ranked.
SEARCH = """
CREATE FUNCTION search_{table}(
    p_tenant text, {parameters}, p_since timestamptz, p_until timestamptz,
    p_words text, p_regex text, p_ranked integer,
    p_after_rank real, p_after_id uuid, p_limit integer
) RETURNS TABLE (id uuid, rank real)
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 10 SET plan_cache_mode = auto AS $function$
#variable_conflict use_column
DECLARE
    v_query tsquery := websearch_to_tsquery('simple', p_words);
    -- What must not occur has no rank.
    v_ranked tsquery := CASE WHEN querytree(v_query) IN ('', 'T') THEN v_query
        ELSE querytree(v_query)::tsquery END;
BEGIN
    IF p_tenant IS DISTINCT FROM current_setting('app.tenant_id', true) THEN
        RETURN;
    ELSIF p_words IS NULL THEN
        -- Until the function ends, for which it has a setting of its own.
        PERFORM set_config('plan_cache_mode', 'force_custom_plan', true);
        RETURN QUERY
        WITH hits AS MATERIALIZED (
            SELECT t.id FROM {table} t WHERE t.tenant_id = p_tenant {filters}
        )
        SELECT hits.id, 0::real FROM hits WHERE p_after_id IS NULL OR hits.id < p_after_id
        ORDER BY hits.id DESC LIMIT p_limit;
    {branches}
    END IF;
END $function$
"""
BRANCH = """
    {case}
        RETURN QUERY
        WITH hits AS MATERIALIZED (
            SELECT t.id FROM {table} t WHERE t.tenant_id = p_tenant AND {words} @@ v_query {filters}
        ), newest AS MATERIALIZED (
            SELECT hits.id FROM hits ORDER BY hits.id DESC LIMIT p_ranked
        ), ranked AS (
            SELECT t.id, ts_rank({words}, v_ranked) AS rank
            FROM newest JOIN {table} t ON t.tenant_id = p_tenant AND t.id = newest.id
            UNION ALL
            SELECT hits.id, 0 FROM hits
            WHERE hits.id < (SELECT newest.id FROM newest ORDER BY newest.id LIMIT 1)
        )
        SELECT ranked.id, ranked.rank FROM ranked
        WHERE p_after_id IS NULL OR (ranked.rank, ranked.id) < (p_after_rank, p_after_id)
        ORDER BY ranked.rank DESC, ranked.id DESC LIMIT p_limit;
"""
DATES = """
    AND (p_since IS NULL OR t.{date} >= p_since) AND (p_until IS NULL OR t.{date} < p_until)
"""
CONTEXT_PARAMETERS = "p_user uuid, p_type text, p_content jsonpath, p_metadata jsonpath"
CONTEXT_FILTERS = """
    AND (p_regex IS NULL OR t.content::text ~* p_regex)
    AND (p_type IS NULL OR t.context_type = p_type)
    AND (p_content IS NULL OR t.content @@ p_content)
    AND (p_metadata IS NULL OR t.metadata @@ p_metadata)
""" + DATES.format(date="updated_at")
MESSAGE_PARAMETERS = "p_user uuid, p_conversation uuid, p_role text, p_extra_data jsonpath"
MESSAGE_FILTERS = """
    AND t.is_active
    AND (p_regex IS NULL OR t.content ~* p_regex)
    AND (p_conversation IS NULL OR t.conversation_id = p_conversation)
    AND (p_user IS NULL OR t.conversation_id IN (
        SELECT c.id FROM conversations c WHERE c.tenant_id = p_tenant AND c.user_id = p_user))
    AND (p_role IS NULL OR t.role = p_role)
    AND (p_extra_data IS NULL OR t.extra_data @@ p_extra_data)
""" + DATES.format(date="created_at")

# The nearest embeddings, and the texts that fit best. A few memories are scanned exactly: an index
# that filters afterwards passes over most of them. So are all, when the index has found too few.
RECALL = """
CREATE FUNCTION recall_memories(
    p_tenant text, p_user uuid, p_conversation uuid, p_persona uuid, p_type text,
    p_embedding {kind}, p_words text, p_regex text, p_candidates integer, p_few integer
) RETURNS TABLE (id uuid, distance double precision, rank real)
LANGUAGE plpgsql STABLE SECURITY DEFINER ROWS 10 AS $function$
#variable_conflict use_column
DECLARE
    v_query tsquery := websearch_to_tsquery('simple', p_words);
    -- What must not occur has no rank.
    v_ranked tsquery := CASE WHEN querytree(v_query) IN ('', 'T') THEN v_query
        ELSE querytree(v_query)::tsquery END;
    v_ids uuid[];
    v_distances double precision[];
    v_few boolean;
BEGIN
    IF p_tenant IS DISTINCT FROM current_setting('app.tenant_id', true) THEN
        RETURN;
    END IF;
    IF p_embedding IS NOT NULL THEN
        -- Of one user or conversation there are few as a rule: what counts them compares them too.
        IF p_conversation IS NOT NULL THEN
            {of_conversation}
        ELSIF p_user IS NOT NULL THEN
            {of_user}
        ELSE
            v_few := (SELECT count(*) <= p_few FROM (
                SELECT FROM conversation_memory t
                WHERE t.tenant_id = p_tenant {filters} LIMIT p_few + 1) these);
            IF v_few THEN
                {of_tenant}
            END IF;
        END IF;
    END IF;
    -- Each of these has an index that helps or not, depending on what is given. Until the function
    -- ends, for which it has a setting of its own.
    PERFORM set_config('plan_cache_mode', 'force_custom_plan', true);
    IF p_embedding IS NOT NULL AND NOT v_few THEN
        SELECT array_agg(near.id), array_agg(near.distance) INTO v_ids, v_distances
        FROM (
            SELECT t.id, t.embedding <=> p_embedding AS distance FROM conversation_memory t
            WHERE t.tenant_id = p_tenant {filters}
            ORDER BY t.embedding <=> p_embedding LIMIT p_candidates
        ) near WHERE near.distance IS NOT NULL;
        IF coalesce(cardinality(v_ids), 0) < p_candidates THEN
            WITH every AS MATERIALIZED (
                SELECT t.id, t.embedding <=> p_embedding AS distance FROM conversation_memory t
                WHERE t.tenant_id = p_tenant AND t.embedding IS NOT NULL {filters}
            )
            SELECT array_agg(near.id), array_agg(near.distance) INTO v_ids, v_distances
            FROM (SELECT * FROM every ORDER BY every.distance, every.id LIMIT p_candidates) near;
        END IF;
    END IF;
    IF p_words IS NULL AND p_regex IS NULL THEN
        RETURN QUERY SELECT near.id, near.distance, NULL::real
        FROM unnest(v_ids, v_distances) near (id, distance);
        RETURN;
    END IF;
    RETURN QUERY
    WITH hits AS MATERIALIZED (
        SELECT t.id, coalesce(ts_rank({words}, v_ranked), 0) AS rank FROM conversation_memory t
        WHERE t.tenant_id = p_tenant
        AND (p_words IS NULL OR {words} @@ v_query)
        AND (p_regex IS NULL OR t.content ~* p_regex) {filters}
    ), best AS (
        SELECT hits.id, hits.rank FROM hits ORDER BY hits.rank DESC, hits.id DESC
        LIMIT p_candidates
    )
    SELECT coalesce(best.id, near.id), coalesce(near.distance, (
        SELECT t.embedding <=> p_embedding FROM conversation_memory t
        WHERE t.tenant_id = p_tenant AND t.id = best.id)), best.rank
    FROM best FULL JOIN unnest(v_ids, v_distances) near (id, distance) ON near.id = best.id;
END $function$
"""
COMPARE_FEW = """
            WITH these AS MATERIALIZED (
                SELECT t.id, t.embedding <=> p_embedding AS distance FROM conversation_memory t
                WHERE t.tenant_id = p_tenant {scope} {filters} LIMIT p_few + 1
            ), near AS (
                SELECT these.id, these.distance FROM these WHERE these.distance IS NOT NULL
                ORDER BY these.distance, these.id LIMIT p_candidates
            )
            SELECT array_agg(near.id), array_agg(near.distance),
                (SELECT count(*) <= p_few FROM these)
            INTO v_ids, v_distances, v_few FROM near;
"""
MEMORY_FILTERS = """
            AND (p_user IS NULL OR t.user_id = p_user)
            AND (p_conversation IS NULL OR t.conversation_id = p_conversation)
            AND (p_persona IS NULL OR t.persona_id = p_persona)
            AND (p_type IS NULL OR t.memory_type = p_type)
"""
# As in the foundation: pgvector indexes `vector` up to 2,000 dimensions, `halfvec` up to 4,000.
INDEXED_AS_VECTOR = 2000

FILTERS = "timestamptz, timestamptz, text, text, integer, real, uuid, integer"
SIGNATURES = (
    "merge_patch(jsonb, jsonb)",
    f"search_contexts(text, uuid, text, jsonpath, jsonpath, {FILTERS})",
    f"search_messages(text, uuid, uuid, text, jsonpath, {FILTERS})",
)
RECALL_SIGNATURE = (
    "recall_memories(text, uuid, uuid, uuid, text, {kind}, text, text, integer, integer)"
)

# Whatever the caller's search_path is; pg_temp last, or a temporary table could stand for ours.
# pgvector's operators may be in another schema than the tables.
FIX_SEARCH_PATH = """
DO $migration$ BEGIN
    EXECUTE format(
        'ALTER FUNCTION {signature} SET search_path = pg_catalog, %s, pg_temp',
        (SELECT string_agg(DISTINCT quote_ident(nspname), ', ') FROM pg_namespace
            WHERE nspname = current_schema()
            OR oid = (SELECT extnamespace FROM pg_extension WHERE extname = 'vector')));
END $migration$
"""
# Or a search whose filter passes over most of what the index finds would end too early, and one
# that looks at no more than it returns would miss near ones. The last is the function's to change.
FOR_RECALL = """
ALTER FUNCTION {signature}
SET hnsw.iterative_scan = 'strict_order' SET hnsw.ef_search = 200 SET plan_cache_mode = auto
"""


def words(text: str, parted: str) -> str:
    return (
        f"to_tsvector('simple'::regconfig, regexp_replace(\"left\"({text}, 100000),"
        rf" '{parted}', ' \1 ', 'g'))"
    )


def search_contexts() -> str:
    """Return the SQL: with words, there is an index for one user and for all."""
    vector = words("t.content::text", f"{JSON_SYNTAX}|({UNSPACED})")
    return SEARCH.format(
        table="contexts",
        parameters=CONTEXT_PARAMETERS,
        filters=CONTEXT_FILTERS + "AND (p_user IS NULL OR t.user_id = p_user)",
        branches="".join(
            BRANCH.format(table="contexts", words=vector, case=case, filters=filters)
            for case, filters in (
                ("ELSIF p_user IS NULL THEN", CONTEXT_FILTERS),
                ("ELSE", CONTEXT_FILTERS + "AND t.user_id = p_user"),
            )
        ),
    )


def search_messages() -> str:
    vector = words("t.content", f"({UNSPACED})")
    return SEARCH.format(
        table="messages",
        parameters=MESSAGE_PARAMETERS,
        filters=MESSAGE_FILTERS,
        branches=BRANCH.format(
            table="messages", words=vector, case="ELSE", filters=MESSAGE_FILTERS
        ),
    )


def signatures() -> tuple[str, ...]:
    return (*SIGNATURES, RECALL_SIGNATURE.format(kind=vector_type()))


def vector_type() -> str:
    dimensions = context.config.attributes["embedding_dimensions"]
    return "vector" if dimensions <= INDEXED_AS_VECTOR else "halfvec"


def recall_memories() -> str:
    def few(scope: str) -> str:
        return COMPARE_FEW.format(scope=scope, filters=MEMORY_FILTERS).strip()

    return RECALL.format(
        kind=vector_type(),
        words=words("t.content", f"({UNSPACED})"),
        filters=MEMORY_FILTERS,
        of_conversation=few("AND t.conversation_id = p_conversation"),
        of_user=few("AND t.user_id = p_user"),
        of_tenant=few(""),
    )


def upgrade() -> None:
    role = context.config.attributes["app_role"]
    op.execute(MERGE_PATCH)
    op.execute(search_contexts())
    op.execute(search_messages())
    op.execute(recall_memories())
    op.execute(FOR_RECALL.format(signature=signatures()[-1]))
    for signature in signatures():
        op.execute(FIX_SEARCH_PATH.format(signature=signature))
        op.execute(f"REVOKE ALL ON FUNCTION {signature} FROM PUBLIC")
        if role:
            op.execute(f"GRANT EXECUTE ON FUNCTION {signature} TO {role}")


def downgrade() -> None:
    for signature in reversed(signatures()):
        op.execute(f"DROP FUNCTION {signature}")
