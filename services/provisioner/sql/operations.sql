-- name: insert_operation
WITH inserted AS (
    INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, request_id, traceparent, queue)
    SELECT %(operation_id)s, engine_id, product_id, user_id, node, %(kind)s, %(actor)s, left(%(request_id)s, 200), %(traceparent)s,
        CASE
            WHEN %(kind)s IN ('provision', 'start', 'restart') OR (%(kind)s = 'wake' AND deep_asleep) THEN 'boot'
            WHEN %(kind)s IN ('sleep', 'deep_sleep') THEN 'sleep'
            ELSE 'other' END
    FROM engines WHERE engine_id = %(engine_id)s
    RETURNING operations
)
SELECT audit_operation(operations, %(detail)s), pg_notify('operations', 'queued') FROM inserted

-- name: notify
-- Wakes workers if something is `queued`, and otherwise those who wait for operations.
SELECT pg_notify('operations', %(news)s)

-- name: open_operation
SELECT operation_id, kind,
    quarantined_at IS NOT NULL OR owner IS NULL OR lease_until < clock_timestamp() AS unowned
FROM operations
WHERE engine_id = %(engine_id)s AND finished_at IS NULL

-- name: lock_open_operation
SELECT operation_id, kind,
    quarantined_at IS NOT NULL OR owner IS NULL OR lease_until < clock_timestamp() AS unowned
FROM operations
WHERE engine_id = %(engine_id)s AND finished_at IS NULL
FOR UPDATE

-- name: settled_operations
-- Those of the given operations that will not go on by themselves.
SELECT operation_id, outcome, error_code, error_message
FROM operations
WHERE operation_id = ANY(%(operation_ids)s) AND (finished_at IS NOT NULL OR quarantined_at IS NOT NULL)

-- name: claim_operations
-- In each queue the products take turns: an operation comes after as many of any other product as
-- its own has under way and waiting before it. What is nobody's comes last.
-- Nothing waits, or is leased, by a backup either, for as long as that: such moments are of before the clock was set back.
-- Materialized: a plan that ran the choice more than once would take more than there is room for.
WITH due AS MATERIALIZED (
    SELECT taken.id
    FROM unnest(%(queues)s::text[], %(places)s::integer[]) AS room (queue, places)
    CROSS JOIN LATERAL (
        SELECT operation_id AS id
        FROM (
            SELECT id, product_id IS NULL AS unowned, place + coalesce(under_way.n, 0) AS turn, not_before
            FROM (
                SELECT operation_id AS id, product_id, not_before,
                    row_number() OVER (PARTITION BY product_id ORDER BY not_before) AS place
                FROM operations
                WHERE node = %(node)s AND queue = room.queue AND finished_at IS NULL AND quarantined_at IS NULL
                    AND not_before NOT BETWEEN clock_timestamp() AND clock_timestamp() + interval '1 minute'
                    AND (owner IS NULL OR lease_until NOT BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 minutes')
                    AND operation_id <> ALL(%(running)s) AND kind = ANY(%(kinds)s) AND step = ANY(%(steps)s)
            ) AS waiting
            LEFT JOIN (
                SELECT product_id, count(*) AS n FROM operations
                WHERE node = %(node)s AND queue = room.queue AND finished_at IS NULL AND quarantined_at IS NULL
                    AND owner IS NOT NULL AND lease_until >= clock_timestamp()
                GROUP BY product_id
            ) AS under_way USING (product_id)
            ORDER BY unowned, turn, not_before
            -- Some to spare: others may be taking the first of them at this moment.
            LIMIT room.places + 16
        ) AS next
        JOIN operations ON operation_id = next.id
        WHERE finished_at IS NULL
            AND (owner IS NULL OR lease_until NOT BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 minutes')
        ORDER BY unowned, turn, next.not_before
        LIMIT room.places
        FOR UPDATE OF operations SKIP LOCKED
    ) AS taken
)
UPDATE operations
SET owner = %(owner)s,
    lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s),
    attempts = attempts + 1,
    deadline = least(deadline, clock_timestamp() + make_interval(secs => %(boot_timeout_s)s))
FROM due
WHERE operation_id = due.id
RETURNING operation_id, engine_id, kind, queue, step, actor, attempts, error_code, error_message,
    cancelled_by IS NOT NULL AS cancelled, request_id, traceparent,
    extract(epoch FROM deadline - clock_timestamp())::double precision AS seconds_left

-- name: renew_leases
UPDATE operations
SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
WHERE operation_id = ANY(%(operation_ids)s) AND owner = %(owner)s AND finished_at IS NULL
    AND lease_until > clock_timestamp()
RETURNING operation_id, cancelled_by IS NOT NULL AS cancelled

-- name: set_step
WITH changed AS (
    UPDATE operations
    SET step = %(step)s, error_code = %(error_code)s, error_message = %(error_message)s, probes = 0
    WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL
    RETURNING operation_id
)
SELECT pg_notify('steps', '') FROM changed

-- name: pin_image
UPDATE engines SET image_id = %(image_id)s
FROM operations
WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL
    AND engines.engine_id = operations.engine_id

-- name: set_probes
WITH changed AS (
    UPDATE operations SET probes = %(probes)s
    WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL
    RETURNING operation_id
)
SELECT pg_notify('steps', '') FROM changed

-- name: sighting
-- How an engine is at this moment; no row once it is gone, or its product disabled.
SELECT status, kind, CASE WHEN step = 'probing' THEN 'probing ' || probes ELSE step END AS step
FROM engines
JOIN products ON products.product_id = engines.product_id AND disabled_at IS NULL
LEFT JOIN operations ON operations.engine_id = engines.engine_id AND finished_at IS NULL
WHERE engines.engine_id = %(engine_id)s

-- name: release_operation
-- Given back unfinished: to go on elsewhere, or here after a pause.
UPDATE operations
SET owner = NULL, lease_until = NULL, not_before = clock_timestamp() + make_interval(secs => %(pause_s)s)
WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL

-- name: quarantine_operation
UPDATE operations
SET owner = NULL, lease_until = NULL, quarantined_at = clock_timestamp(),
    error_code = 'INTERNAL', error_message = 'the operation could not be carried out; operation id ' || operation_id
WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL

-- name: request_cancel
-- Told to the workers like work that is queued: its owner learns of it when it renews the lease.
-- One that still waits does so no longer: somebody waits for its end.
WITH changed AS (
    UPDATE operations
    SET cancelled_by = %(actor)s, queue = 'other', not_before = least(not_before, clock_timestamp())
    WHERE operation_id = %(operation_id)s
    RETURNING operation_id
)
SELECT pg_notify('operations', 'queued') FROM changed

-- name: hold_operation
-- Locks the engine and then its operation, and reads them as they are once both locks were had.
-- While they are held nobody can take the operation over.
SELECT status, cancelled_by
FROM operations JOIN engines USING (engine_id)
WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL
FOR UPDATE OF engines, operations

-- name: finish_operation
WITH finished AS (
    UPDATE operations
    SET outcome = %(outcome)s, error_code = %(error_code)s, error_message = %(error_message)s,
        owner = NULL, lease_until = NULL, finished_at = clock_timestamp()
    WHERE operation_id = %(operation_id)s
    RETURNING *, operations
)
SELECT operation_id, outcome, error_code, error_message,
    audit_operation(operations, NULL), pg_notify('operations', 'ended')
FROM finished

-- name: insert_gave_up_event
INSERT INTO audit_events (action, actor, outcome, product_id, engine_id, user_id, error_code, detail)
SELECT 'auto_restart_gave_up', actor, 'failed', product_id, engine_id, user_id, error_code, error_message
FROM operations WHERE operation_id = %(operation_id)s AND product_id IS NOT NULL
