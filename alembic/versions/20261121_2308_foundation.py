"""Foundation: all tables, their keys, indexes and policies, and the application's role."""

from __future__ import annotations

from alembic import context, op

revision = "4664bd8cc5ad"
down_revision = None
branch_labels = None
depends_on = None

# A character of a script whose words no spaces part: in text search each stands alone.
UNSPACED = (
    r"[\u0E00-\u0EFF\u1000-\u11FF\u1780-\u17FF\u2E80-\u2FDF\u3005-\u3007\u3040-\u31FF"
    r"\u3400-\u4DBF\u4E00-\u9FFF\uAC00-\uD7FF\uF900-\uFAFF\uFF66-\uFF9F\U00020000-\U0003FFFF]"
)
# A member's name, and an escaped character, are no words.
JSON_SYNTAX = r'"(?:[^"\\]|\\.)*": |\\(?:.|u....)'

# In the order in which they can be made; dropped in the opposite one.
TABLES = (
    "users",
    "identities",
    "api_keys",
    "contexts",
    "personas",
    "modules",
    "conversations",
    "messages",
    "conversation_states",
    "conversation_memory",
)

# pgvector indexes `vector` up to 2,000 dimensions, `halfvec` up to 4,000.
INDEXED_AS_VECTOR = 2000

EXTENSIONS = ("vector", "pg_trgm", "btree_gin")

EXTENSION = """
DO $migration$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = '{name}') THEN
        CREATE EXTENSION IF NOT EXISTS {name};
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE insufficient_privilege USING
        MESSAGE = 'this login may not create the extension {name}',
        HINT = 'A database administrator must run, in this database: {hint}';
END $migration$
"""

ROLE = """
DO $migration$ BEGIN
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
            CREATE ROLE {role} NOLOGIN;
        END IF;
    EXCEPTION
        -- Another database of this server is migrated at the same time.
        WHEN duplicate_object OR unique_violation THEN NULL;
    END;
    BEGIN
        IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            EXECUTE format('GRANT {role} TO %I', current_user);
        END IF;
    EXCEPTION
        WHEN unique_violation THEN NULL;
        WHEN insufficient_privilege THEN
            IF NOT pg_has_role('{role}', 'MEMBER') THEN
                RAISE;
            END IF;
    END;
    -- Whoever does not own the schema gets no error here, but a warning.
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO {role}', current_schema());
    IF NOT has_schema_privilege('{role}', current_schema(), 'USAGE') THEN
        RAISE insufficient_privilege;
    END IF;
    GRANT SELECT ON alembic_version TO {role};
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES IN SCHEMA %I'
        ' GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role}', current_schema());
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES IN SCHEMA %I'
        ' GRANT USAGE, SELECT ON SEQUENCES TO {role}', current_schema());
EXCEPTION WHEN insufficient_privilege THEN
    RAISE insufficient_privilege USING
        MESSAGE = 'this login may not make or use the role {role}',
        HINT = format(
            'A database administrator must run: %sGRANT {role} TO %I;'
            ' GRANT USAGE ON SCHEMA %I TO {role}; or set DATABASE_APP_ROLE.',
            CASE WHEN NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}')
                THEN 'CREATE ROLE {role} NOLOGIN; ' END,
            current_user, current_schema());
END $migration$
"""

REVOKE = """
DO $migration$ BEGIN
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES IN SCHEMA %I'
        ' REVOKE SELECT, INSERT, UPDATE, DELETE ON TABLES FROM {role}', current_schema());
    EXECUTE format(
        'ALTER DEFAULT PRIVILEGES IN SCHEMA %I'
        ' REVOKE USAGE, SELECT ON SEQUENCES FROM {role}', current_schema());
    EXECUTE format('REVOKE USAGE ON SCHEMA %I FROM {role}', current_schema());
    REVOKE SELECT ON alembic_version FROM {role};
EXCEPTION
    WHEN undefined_object THEN NULL;
END $migration$
"""

SCHEMA = r"""
CREATE TABLE users (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_users_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    email varchar(255),
    username varchar(255),
    first_name varchar(255),
    last_name varchar(255),
    is_admin boolean NOT NULL DEFAULT false,
    is_active boolean NOT NULL DEFAULT true,
    settings jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    last_active_at timestamptz,
    CONSTRAINT pk_users PRIMARY KEY (tenant_id, id),
    CONSTRAINT uq_users_email UNIQUE (tenant_id, email),
    CONSTRAINT ck_users_email
        CHECK (email = lower(email) AND position('@' in email) > 1)
);

CREATE INDEX ix_users_created_at_id
    ON users (tenant_id, created_at, id);

CREATE TABLE identities (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_identities_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    user_id uuid NOT NULL,
    provider varchar(64) NOT NULL,
    subject varchar(255) NOT NULL,
    data jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    CONSTRAINT pk_identities PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_identities_user_id
        FOREIGN KEY (tenant_id, user_id)
        REFERENCES users (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_identities_provider_subject UNIQUE (tenant_id, provider, subject),
    CONSTRAINT ck_identities_provider CHECK (provider <> ''),
    CONSTRAINT ck_identities_subject CHECK (subject <> '')
);

CREATE INDEX ix_identities_user_id
    ON identities (tenant_id, user_id);

CREATE TABLE api_keys (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_api_keys_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    user_id uuid NOT NULL,
    name varchar(255),
    key_hash bytea NOT NULL,
    prefix varchar(32) NOT NULL,
    last_used_at timestamptz,
    expires_at timestamptz,
    revoked_at timestamptz,
    CONSTRAINT pk_api_keys PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_api_keys_user_id
        FOREIGN KEY (tenant_id, user_id)
        REFERENCES users (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_api_keys_key_hash UNIQUE (tenant_id, key_hash),
    CONSTRAINT ck_api_keys_key_hash CHECK (octet_length(key_hash) = 32)
);

CREATE INDEX ix_api_keys_user_id
    ON api_keys (tenant_id, user_id);

CREATE TABLE contexts (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_contexts_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    user_id uuid NOT NULL,
    context_type varchar(64) NOT NULL,
    source_identifier varchar(255),
    content jsonb NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    expires_at timestamptz,
    CONSTRAINT pk_contexts PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_contexts_user_id
        FOREIGN KEY (tenant_id, user_id)
        REFERENCES users (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_contexts_source UNIQUE (tenant_id, user_id, context_type, source_identifier),
    CONSTRAINT ck_contexts_context_type CHECK (context_type <> '')
);

CREATE INDEX ix_contexts_content
    ON contexts USING gin (tenant_id, user_id, content jsonb_path_ops);

CREATE INDEX ix_contexts_expires_at
    ON contexts (tenant_id, expires_at)
    WHERE expires_at IS NOT NULL;

CREATE INDEX ix_contexts_substring
    ON contexts USING gin (tenant_id, user_id, (content::text) gin_trgm_ops);

CREATE INDEX ix_contexts_text
    ON contexts USING gin (
        tenant_id, user_id,
        to_tsvector('simple'::regconfig, regexp_replace(
            "left"(content::text, 100000), '{json_syntax}|({unspaced})', ' \1 ', 'g'))
    );

CREATE INDEX ix_contexts_updated_at_id
    ON contexts (tenant_id, updated_at, id);

CREATE INDEX ix_contexts_user_id_updated_at_id
    ON contexts (tenant_id, user_id, updated_at, id);

CREATE TABLE personas (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_personas_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    name varchar(255) NOT NULL,
    description text,
    template text NOT NULL,
    mode varchar(32) NOT NULL DEFAULT 'reactive',
    loop_frequency varchar(32),
    first_message text,
    image_path varchar(500),
    extra_data jsonb,
    is_active boolean NOT NULL DEFAULT true,
    CONSTRAINT pk_personas PRIMARY KEY (tenant_id, id),
    CONSTRAINT uq_personas_name UNIQUE (tenant_id, name),
    CONSTRAINT ck_personas_name CHECK (name <> ''),
    CONSTRAINT ck_personas_loop_frequency CHECK (
        loop_frequency IS NULL OR (
            mode = 'autonomous'
            AND loop_frequency ~ '^[0-9]+(\.[0-9]+)?$' AND loop_frequency ~ '[1-9]'
        )
    ),
    CONSTRAINT ck_personas_mode CHECK (mode IN ('reactive', 'autonomous'))
);

CREATE INDEX ix_personas_created_at_id
    ON personas (tenant_id, created_at, id);

CREATE TABLE modules (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_modules_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    name varchar(64) NOT NULL,
    description text,
    content text,
    type varchar(32) NOT NULL DEFAULT 'simple',
    trigger_pattern varchar(500),
    script text,
    execution_context varchar(32) NOT NULL DEFAULT 'ON_DEMAND',
    requires_ai_inference boolean NOT NULL DEFAULT false,
    stage_priority integer NOT NULL DEFAULT 100,
    script_analysis_metadata jsonb,
    is_active boolean NOT NULL DEFAULT true,
    CONSTRAINT pk_modules PRIMARY KEY (tenant_id, id),
    CONSTRAINT uq_modules_name UNIQUE (tenant_id, name),
    CONSTRAINT ck_modules_name CHECK (name ~ '^[a-z][a-z0-9_]{{0,49}}$'),
    CONSTRAINT ck_modules_type CHECK (type IN ('simple', 'advanced')),
    CONSTRAINT ck_modules_execution_context
        CHECK (execution_context IN ('IMMEDIATE', 'POST_RESPONSE', 'ON_DEMAND'))
);

CREATE INDEX ix_modules_created_at_id
    ON modules (tenant_id, created_at, id);

CREATE TABLE conversations (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_conversations_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    thread_id varchar(255) NOT NULL,
    user_id uuid,
    persona_id uuid,
    title varchar(500),
    last_message text,
    message_count integer NOT NULL DEFAULT 0,
    last_position bigint NOT NULL DEFAULT 0,
    last_sequence bigint NOT NULL DEFAULT 0,
    head_id uuid,
    version integer NOT NULL DEFAULT 1,
    provider_type varchar(64),
    provider_config jsonb,
    metadata jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    expires_at timestamptz,
    CONSTRAINT pk_conversations PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_conversations_user_id
        FOREIGN KEY (tenant_id, user_id)
        REFERENCES users (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_conversations_thread_id UNIQUE (tenant_id, thread_id),
    CONSTRAINT ck_conversations_thread_id CHECK (thread_id <> ''),
    CONSTRAINT ck_conversations_message_count CHECK (message_count >= 0),
    CONSTRAINT ck_conversations_last_position CHECK (last_position >= 0)
);

CREATE INDEX ix_conversations_expires_at
    ON conversations (tenant_id, expires_at)
    WHERE expires_at IS NOT NULL;

CREATE INDEX ix_conversations_head_id
    ON conversations (tenant_id, head_id)
    WHERE head_id IS NOT NULL;

CREATE INDEX ix_conversations_persona_id
    ON conversations (tenant_id, persona_id)
    WHERE persona_id IS NOT NULL;

CREATE INDEX ix_conversations_updated_at_id
    ON conversations (tenant_id, updated_at, id);

CREATE INDEX ix_conversations_user_id_updated_at_id
    ON conversations (tenant_id, user_id, updated_at, id);

CREATE TABLE messages (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_messages_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    conversation_id uuid NOT NULL,
    parent_id uuid,
    position bigint NOT NULL,
    role varchar(32) NOT NULL,
    content text NOT NULL,
    thinking text,
    extra_data jsonb,
    data bytea,
    data_format varchar(64),
    run_id varchar(255),
    tool_call_id varchar(255),
    model varchar(255),
    input_tokens integer,
    output_tokens integer,
    is_active boolean NOT NULL DEFAULT true,
    idempotency_key varchar(255),
    CONSTRAINT pk_messages PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_messages_conversation_id
        FOREIGN KEY (tenant_id, conversation_id)
        REFERENCES conversations (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_messages_conversation_id_position UNIQUE (tenant_id, conversation_id, position),
    CONSTRAINT ck_messages_position CHECK (position > 0),
    CONSTRAINT ck_messages_input_tokens CHECK (input_tokens >= 0),
    CONSTRAINT ck_messages_output_tokens CHECK (output_tokens >= 0),
    CONSTRAINT ck_messages_role CHECK (role IN ('user', 'assistant', 'system', 'tool'))
);

CREATE INDEX ix_messages_parent_id
    ON messages (tenant_id, parent_id)
    WHERE parent_id IS NOT NULL;

CREATE INDEX ix_messages_text
    ON messages USING gin (
        tenant_id,
        to_tsvector('simple'::regconfig, regexp_replace(
            "left"(content, 100000), '({unspaced})', ' \1 ', 'g'))
    );

CREATE UNIQUE INDEX uq_messages_idempotency_key
    ON messages (tenant_id, conversation_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

CREATE TABLE conversation_states (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_conversation_states_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    conversation_id uuid NOT NULL,
    persona_id uuid,
    module_id uuid,
    execution_stage varchar(32),
    state_key varchar(255) NOT NULL,
    state_value jsonb NOT NULL,
    execution_metadata jsonb,
    executed_at timestamptz NOT NULL DEFAULT now(),
    version integer NOT NULL DEFAULT 1,
    CONSTRAINT pk_conversation_states PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_conversation_states_conversation_id
        FOREIGN KEY (tenant_id, conversation_id)
        REFERENCES conversations (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT fk_conversation_states_persona_id
        FOREIGN KEY (tenant_id, persona_id)
        REFERENCES personas (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT fk_conversation_states_module_id
        FOREIGN KEY (tenant_id, module_id)
        REFERENCES modules (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_conversation_states_key UNIQUE NULLS NOT DISTINCT
        (tenant_id, conversation_id, persona_id, module_id, execution_stage, state_key),
    CONSTRAINT ck_conversation_states_state_key CHECK (state_key <> ''),
    CONSTRAINT ck_conversation_states_version CHECK (version > 0)
);

CREATE INDEX ix_conversation_states_module_id
    ON conversation_states (tenant_id, module_id)
    WHERE module_id IS NOT NULL;

CREATE INDEX ix_conversation_states_persona_id
    ON conversation_states (tenant_id, persona_id)
    WHERE persona_id IS NOT NULL;

CREATE TABLE conversation_memory (
    tenant_id text NOT NULL DEFAULT current_setting('app.tenant_id'::text, true)
        CONSTRAINT ck_conversation_memory_tenant_id
        CHECK (tenant_id ~ '^[A-Za-z0-9][A-Za-z0-9_.:@-]{{0,63}}$'),
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    conversation_id uuid NOT NULL,
    user_id uuid,
    persona_id uuid,
    first_message_id uuid,
    sequence bigint NOT NULL,
    content text NOT NULL,
    memory_type varchar(64),
    importance double precision NOT NULL DEFAULT 0.5,
    embedding {vector},
    metadata jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    last_accessed_at timestamptz NOT NULL DEFAULT now(),
    access_count integer NOT NULL DEFAULT 0,
    first_position bigint,
    last_position bigint,
    message_count integer,
    CONSTRAINT pk_conversation_memory PRIMARY KEY (tenant_id, id),
    CONSTRAINT fk_conversation_memory_conversation_id
        FOREIGN KEY (tenant_id, conversation_id)
        REFERENCES conversations (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT fk_conversation_memory_user_id
        FOREIGN KEY (tenant_id, user_id)
        REFERENCES users (tenant_id, id) ON DELETE CASCADE,
    CONSTRAINT uq_conversation_memory_conversation_id_sequence
        UNIQUE (tenant_id, conversation_id, sequence),
    CONSTRAINT ck_conversation_memory_importance CHECK (importance >= 0 AND importance <= 1),
    CONSTRAINT ck_conversation_memory_sequence CHECK (sequence > 0),
    CONSTRAINT ck_conversation_memory_access_count CHECK (access_count >= 0),
    CONSTRAINT ck_conversation_memory_message_count CHECK (message_count >= 0),
    CONSTRAINT ck_conversation_memory_range
        CHECK (
            num_nonnulls(first_position, last_position) <> 1
            AND first_position > 0 AND first_position <= last_position
        )
) WITH (fillfactor = 80);

CREATE INDEX ix_conversation_memory_embedding
    ON conversation_memory USING hnsw (embedding {vector_ops});

CREATE INDEX ix_conversation_memory_first_message_id
    ON conversation_memory (tenant_id, first_message_id)
    WHERE first_message_id IS NOT NULL;

CREATE INDEX ix_conversation_memory_persona_id
    ON conversation_memory (tenant_id, persona_id)
    WHERE persona_id IS NOT NULL;

CREATE INDEX ix_conversation_memory_text
    ON conversation_memory USING gin (
        tenant_id,
        to_tsvector('simple'::regconfig, regexp_replace(
            "left"(content, 100000), '({unspaced})', ' \1 ', 'g'))
    );

CREATE INDEX ix_conversation_memory_user_id
    ON conversation_memory (tenant_id, user_id);

ALTER TABLE conversations
    ADD CONSTRAINT fk_conversations_head_id FOREIGN KEY (tenant_id, head_id)
    REFERENCES messages (tenant_id, id) ON DELETE SET NULL (head_id);

ALTER TABLE conversations
    ADD CONSTRAINT fk_conversations_persona_id FOREIGN KEY (tenant_id, persona_id)
    REFERENCES personas (tenant_id, id) ON DELETE SET NULL (persona_id);

ALTER TABLE messages
    ADD CONSTRAINT fk_messages_parent_id FOREIGN KEY (tenant_id, parent_id)
    REFERENCES messages (tenant_id, id) ON DELETE SET NULL (parent_id);

ALTER TABLE conversation_memory
    ADD CONSTRAINT fk_conversation_memory_first_message_id FOREIGN KEY (tenant_id, first_message_id)
    REFERENCES messages (tenant_id, id) ON DELETE SET NULL (first_message_id);

ALTER TABLE conversation_memory
    ADD CONSTRAINT fk_conversation_memory_persona_id FOREIGN KEY (tenant_id, persona_id)
    REFERENCES personas (tenant_id, id) ON DELETE SET NULL (persona_id);
"""

POLICY = """
CREATE POLICY tenant_isolation ON {table}
    USING (tenant_id = (SELECT current_setting('app.tenant_id', true)))
    WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id', true)))
"""


def upgrade() -> None:
    role = context.config.attributes["app_role"]
    dimensions = context.config.attributes["embedding_dimensions"]
    kind = "vector" if dimensions <= INDEXED_AS_VECTOR else "halfvec"

    hint = " ".join(f"CREATE EXTENSION IF NOT EXISTS {name};" for name in EXTENSIONS)
    for name in EXTENSIONS:
        op.execute(EXTENSION.format(name=name, hint=hint))
    schema = SCHEMA.format(
        vector=f"{kind}({dimensions})",
        vector_ops=f"{kind}_cosine_ops",
        unspaced=UNSPACED,
        json_syntax=JSON_SYNTAX,
    )
    for statement in schema.split(";\n"):
        if statement.strip():
            op.execute(statement.strip())
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(POLICY.format(table=table))
    if role:
        op.execute(ROLE.format(role=role))
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(TABLES)} TO {role}")


def downgrade() -> None:
    # One statement: conversations and messages refer to each other.
    op.execute(f"DROP TABLE {', '.join(reversed(TABLES))}")
    role = context.config.attributes["app_role"]
    if role:
        op.execute(REVOKE.format(role=role))
