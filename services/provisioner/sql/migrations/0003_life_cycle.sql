-- What the life cycle, sleep, health, the fleet's counts and the audit log need.

ALTER TABLE products
    ADD COLUMN idle_sleep_after_s integer CHECK (idle_sleep_after_s > 0),
    ADD COLUMN max_keep_awake_s integer NOT NULL DEFAULT 3600 CHECK (max_keep_awake_s >= 0),
    ADD COLUMN disabled_at timestamptz;

-- When an old key stops being taken; null for never.
ALTER TABLE platform_keys ADD COLUMN expires_at timestamptz;

ALTER TABLE engines
    ADD COLUMN status_since timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Why the engine is in its status, where that isn't plain.
    ADD COLUMN status_reason text,
    -- Last sign of work that the engine itself gave, and which.
    ADD COLUMN busy_at timestamptz,
    ADD COLUMN busy_reason text,
    -- A sleeper whose instance was stopped to free its memory: waking it takes a start.
    ADD COLUMN deep_asleep boolean NOT NULL DEFAULT false,
    -- Probes failed in a row.
    ADD COLUMN health_failures integer NOT NULL DEFAULT 0,
    -- Automatic restarts tried since the engine was last well for long, and when the next is due;
    -- null for none: it is not failed, or was given up.
    ADD COLUMN restart_attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN restart_at timestamptz,
    -- A key that the engine is being given, accepted beside its own until it is committed.
    ADD COLUMN pending_key bytea;
CREATE INDEX engines_product_status ON engines (product_id, status, created_at, engine_id);
CREATE INDEX engines_product_created ON engines (product_id, created_at, engine_id);
CREATE INDEX engines_created ON engines (created_at, engine_id);
CREATE INDEX engines_status_created ON engines (status, created_at, engine_id);
CREATE INDEX engines_awake ON engines (node, status_since) WHERE status = 'running';
CREATE INDEX engines_light_sleepers ON engines (node, status_since) WHERE status = 'sleeping' AND NOT deep_asleep;
CREATE INDEX engines_restart ON engines (node, restart_at) WHERE restart_at IS NOT NULL;

CREATE FUNCTION touch_status() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.status_since := clock_timestamp();
    RETURN NEW;
END
$$;
CREATE TRIGGER engines_status_since BEFORE UPDATE OF status ON engines
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION touch_status();

-- Probes that a boot has made so far.
ALTER TABLE operations ADD COLUMN probes integer NOT NULL DEFAULT 0;

-- What Admission knows of use, flushed in bulk. A table of its own, so that admits do not write engines.
CREATE TABLE engine_activity (
    engine_id uuid PRIMARY KEY REFERENCES engines ON DELETE CASCADE,
    last_admit_at timestamptz NOT NULL,
    keep_awake_until timestamptz
) WITH (fillfactor = 70);

-- Admission replicas, by their last flush. Whoever puts an engine to sleep waits for a flush of
-- every replica that may still have admitted to it.
CREATE TABLE admission_replicas (
    replica_id uuid PRIMARY KEY,
    flushed_at timestamptz NOT NULL
);

-- Denials counted by Admission, until their minute is over and they become one audit event.
CREATE TABLE admit_denials (
    product_id uuid NOT NULL REFERENCES products,
    reason text NOT NULL,
    minute timestamptz NOT NULL,
    denials integer NOT NULL,
    PRIMARY KEY (minute, product_id, reason)
);

-- Loops that only one process runs at a time. The term grows with every change of hands.
CREATE TABLE loop_leases (
    name text PRIMARY KEY,
    owner uuid NOT NULL,
    term bigint NOT NULL,
    lease_until timestamptz NOT NULL
);

-- Counts that would take long to make anew: engines by status (`engines:running`), and what a
-- product has ever provisioned and destroyed. Changes are appended, so that writers do not wait
-- for each other, and folded together by a loop; the count is the sum.
CREATE TABLE counts (
    product_id uuid NOT NULL REFERENCES products,
    name text NOT NULL,
    n bigint NOT NULL
);
CREATE INDEX counts_product_name ON counts (product_id, name);
INSERT INTO counts SELECT product_id, 'engines:' || status, count(*) FROM engines GROUP BY 1, 2;

CREATE FUNCTION count_engine() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') THEN
        INSERT INTO counts VALUES (OLD.product_id, 'engines:' || OLD.status, -1);
    END IF;
    IF TG_OP IN ('UPDATE', 'INSERT') THEN
        INSERT INTO counts VALUES (NEW.product_id, 'engines:' || NEW.status, 1);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER engines_counted AFTER INSERT OR DELETE ON engines FOR EACH ROW EXECUTE FUNCTION count_engine();
CREATE TRIGGER engines_recounted AFTER UPDATE OF status ON engines
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION count_engine();

-- The audit log: a partition a month, dropped whole when it is too old, and otherwise only added to.
ALTER TABLE audit_events RENAME TO audit_events_unpartitioned;
CREATE TABLE audit_events (
    event_id bigint GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    action text NOT NULL,
    actor text NOT NULL,
    outcome text NOT NULL,
    product_id uuid NOT NULL,
    engine_id uuid,
    user_id text,
    duration_ms integer,
    error_code text,
    -- Why, in words, where that isn't plain.
    detail text,
    -- How many calls it stands for, if they were counted together.
    count integer,
    PRIMARY KEY (event_id, at)
) PARTITION BY RANGE (at);
CREATE INDEX audit_events_product ON audit_events (product_id, event_id);
CREATE INDEX audit_events_product_action ON audit_events (product_id, action, event_id);
CREATE INDEX audit_events_user ON audit_events (product_id, user_id, event_id) WHERE user_id IS NOT NULL;
CREATE INDEX audit_events_action ON audit_events (action, event_id);
-- What the metrics of the past hour count, of one product and of all.
CREATE INDEX audit_events_product_hour ON audit_events (product_id, at) INCLUDE (action, duration_ms)
    WHERE action IN ('health_failed', 'auto_restart_start') OR (action = 'provision' AND outcome = 'succeeded');
CREATE INDEX audit_events_hour ON audit_events (at) INCLUDE (action, duration_ms)
    WHERE action IN ('health_failed', 'auto_restart_start') OR (action = 'provision' AND outcome = 'succeeded');
-- Catches what no month has, so that a forgotten month never stops an operation.
CREATE TABLE audit_events_other PARTITION OF audit_events DEFAULT;

INSERT INTO audit_events (at, action, actor, outcome, product_id, engine_id, user_id, duration_ms, error_code)
    SELECT at, action, actor, outcome, product_id, engine_id, user_id, duration_ms, error_code
    FROM audit_events_unpartitioned ORDER BY event_id;
DROP TABLE audit_events_unpartitioned;

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is only added to';
END
$$;
CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
-- Partitions have the row triggers of their table, but not this one.
CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON audit_events_other
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Makes the partitions of this month, of the next, and of every month that the default partition
-- has caught, whose events move there. The lock is for others who do the same, not for writers.
CREATE FUNCTION make_audit_partitions() RETURNS SETOF text LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    month timestamptz;
    part text;
BEGIN
    LOCK TABLE audit_events IN SHARE UPDATE EXCLUSIVE MODE;
    -- As an array: a table that a query is reading can't be altered.
    FOREACH month IN ARRAY ARRAY(
        SELECT date_trunc('month', clock_timestamp()) + make_interval(months => i) FROM generate_series(0, 1) AS i
        UNION SELECT date_trunc('month', at) FROM audit_events_other)
    LOOP
        part := 'audit_events_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass(part) IS NOT NULL;
        EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS)', part);
        -- From here until the end nobody writes to the default partition.
        ALTER TABLE audit_events_other DISABLE TRIGGER USER;
        EXECUTE format(
            'WITH moved AS (DELETE FROM audit_events_other WHERE at >= %L AND at < %L RETURNING *)'
            ' INSERT INTO %I SELECT * FROM moved', month, month + interval '1 month', part);
        ALTER TABLE audit_events_other ENABLE TRIGGER USER;
        EXECUTE format(
            'ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            part, month, month + interval '1 month');
        EXECUTE format(
            'CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON %I'
            ' FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', part);
        RETURN NEXT part;
    END LOOP;
END
$$;

-- Drops the months that ended longer ago than events are kept. Writers wait for it, so it waits for
-- no more than a moment itself.
CREATE FUNCTION drop_audit_partitions(p_kept interval) RETURNS SETOF text
LANGUAGE plpgsql SET timezone = 'UTC' SET lock_timeout = '1s' AS $$
DECLARE
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY(
        SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid
        WHERE inhparent = 'audit_events'::regclass
            AND to_date(substring(relname FROM '^audit_events_(\d{4}_\d\d)$'), 'YYYY_MM') + interval '1 month'
                <= clock_timestamp() - p_kept)
    LOOP
        EXECUTE format('DROP TABLE %I', part);
        RETURN NEXT part;
    END LOOP;
END
$$;

CREATE FUNCTION count_audit_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO counts VALUES (NEW.product_id, NEW.action, 1);
    RETURN NULL;
END
$$;
CREATE TRIGGER audit_events_counted AFTER INSERT ON audit_events
    FOR EACH ROW WHEN (NEW.outcome = 'succeeded' AND NEW.action IN ('provision', 'destroy'))
    EXECUTE FUNCTION count_audit_event();
INSERT INTO counts SELECT product_id, action, count(*) FROM audit_events
    WHERE outcome = 'succeeded' AND action IN ('provision', 'destroy') GROUP BY 1, 2;

-- Last: a table can't be altered while its triggers are still to fire.
SELECT make_audit_partitions();
