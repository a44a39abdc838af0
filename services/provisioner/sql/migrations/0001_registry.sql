-- The registry. The Provisioner alone writes it, but for the rate limiter's tables.

-- Names what this registry owns outside of it: every container and process carries this id.
CREATE TABLE installation (
    installation_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    only_one boolean NOT NULL DEFAULT true UNIQUE CHECK (only_one),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO installation DEFAULT VALUES;

CREATE TABLE products (
    product_id uuid PRIMARY KEY,
    slug text NOT NULL UNIQUE,
    max_engines integer NOT NULL CHECK (max_engines >= 0),
    rate_limit_rpm integer CHECK (rate_limit_rpm > 0),
    allowed_images text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE platform_keys (
    key_hash bytea PRIMARY KEY CHECK (length(key_hash) = 32),
    product_id uuid NOT NULL REFERENCES products,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX platform_keys_product ON platform_keys (product_id);

CREATE TABLE engines (
    engine_id uuid PRIMARY KEY,
    product_id uuid NOT NULL REFERENCES products,
    user_id text NOT NULL CHECK (length(user_id) BETWEEN 1 AND 255),
    status text NOT NULL
        CHECK (status IN ('provisioning', 'running', 'sleeping', 'stopped', 'failed', 'destroying')),
    image text NOT NULL,
    generation integer NOT NULL DEFAULT 1,
    node text NOT NULL,
    url text NOT NULL,
    encrypted_key bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_health_at timestamptz,
    UNIQUE (product_id, user_id)
);
CREATE INDEX engines_node ON engines (node);

-- One engine per port of a node, and one port per engine.
CREATE TABLE port_leases (
    node text NOT NULL,
    port integer NOT NULL CHECK (port BETWEEN 1 AND 65535),
    engine_id uuid NOT NULL UNIQUE REFERENCES engines,
    PRIMARY KEY (node, port)
);

-- Ports that a node's host refused, left alone until a moment.
CREATE TABLE ports_set_aside (
    node text NOT NULL,
    port integer NOT NULL,
    until timestamptz NOT NULL,
    PRIMARY KEY (node, port)
);

-- Every change of an engine: intent first, then effect. No reference to the engine, whose row a
-- destroy deletes before the operation is history.
CREATE TABLE operations (
    operation_id uuid PRIMARY KEY,
    engine_id uuid NOT NULL,
    product_id uuid NOT NULL,
    user_id text NOT NULL,
    -- Only a process that reaches this node's backend can execute it.
    node text NOT NULL,
    kind text NOT NULL,
    step text NOT NULL DEFAULT 'queued',
    actor text NOT NULL,
    -- The process that executes it, for as long as the lease runs.
    owner uuid,
    lease_until timestamptz,
    -- When a boot is given up; set when it is first taken up, waiting in the queue is not booting.
    deadline timestamptz,
    -- Not taken up before this moment, after a failed attempt.
    not_before timestamptz NOT NULL DEFAULT clock_timestamp(),
    attempts integer NOT NULL DEFAULT 0,
    -- Who asked for the destroy that it has to give way to.
    cancelled_by text,
    -- Could not be processed; left for an operator, out of the workers' way.
    quarantined_at timestamptz,
    outcome text CHECK (outcome IN ('succeeded', 'failed', 'cancelled')),
    -- A code of the error table and its message, once failed.
    error_code text,
    error_message text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    CHECK ((outcome IS NULL) = (finished_at IS NULL))
);
CREATE UNIQUE INDEX operations_open ON operations (engine_id) WHERE finished_at IS NULL;
CREATE INDEX operations_queue ON operations (node, not_before)
    WHERE finished_at IS NULL AND quarantined_at IS NULL;
CREATE INDEX operations_engine ON operations (engine_id, created_at);

CREATE TABLE audit_events (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL,
    actor text NOT NULL,
    outcome text NOT NULL,
    product_id uuid NOT NULL,
    engine_id uuid,
    user_id text,
    duration_ms integer,
    -- A code of the error table, if it failed.
    error_code text
);
