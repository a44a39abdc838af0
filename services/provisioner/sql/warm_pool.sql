-- name: members
-- Those that are to stay, the ready ones first, and of them those that came first.
SELECT engines.engine_id, image, url, status, quarantined_at IS NOT NULL AS stuck
FROM engines LEFT JOIN operations ON operations.engine_id = engines.engine_id AND finished_at IS NULL
WHERE engines.node = %(node)s AND engines.product_id IS NULL AND status <> 'destroying'
ORDER BY status = 'running' DESC, engines.created_at

-- name: candidates
-- None for a user who has an engine. At random, so that two Provisioners rarely try the same.
SELECT engine_id, image, url, status, false AS stuck
FROM engines
WHERE node = %(node)s AND product_id IS NULL AND status = 'running' AND image = %(image)s
    AND NOT EXISTS (SELECT FROM engines e WHERE e.product_id = %(product_id)s AND e.user_id = %(user_id)s)
ORDER BY random()

-- name: claim
-- No row if somebody else claims or drops it. What happens to a member other than that changes its
-- status, so that a running one has no operation open.
WITH claimed AS (
    UPDATE engines
    SET product_id = %(product_id)s, user_id = %(user_id)s, created_at = clock_timestamp(),
        status_since = clock_timestamp(), last_health_at = clock_timestamp(), restart_attempts = 0
    WHERE engine_id = (
        SELECT engine_id FROM engines
        WHERE engine_id = %(engine_id)s AND product_id IS NULL AND status = 'running'
        FOR UPDATE SKIP LOCKED)
    RETURNING *
), audited AS (
    INSERT INTO audit_events (action, actor, outcome, product_id, engine_id, user_id, duration_ms, detail)
    SELECT 'provision', %(actor)s, 'succeeded', product_id, engine_id, user_id, %(duration_ms)s, 'from the warm pool'
    FROM claimed
), ended AS (
    INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, outcome, finished_at)
    SELECT gen_random_uuid(), engine_id, product_id, user_id, node, 'provision', %(actor)s, 'succeeded',
        clock_timestamp()
    FROM claimed
    RETURNING operation_id
), counted AS (
    INSERT INTO counts SELECT product_id, 'claim', 1 FROM claimed
), admitted AS (
    INSERT INTO engine_activity (engine_id, last_admit_at) SELECT engine_id, clock_timestamp() FROM claimed
)
SELECT claimed.*, port, operation_id
FROM claimed CROSS JOIN ended LEFT JOIN port_leases USING (engine_id, node)

-- name: lock_member
-- No row if it has an owner by now, or is gone, or going.
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE engine_id = %(engine_id)s AND product_id IS NULL AND status <> 'destroying'
FOR UPDATE OF engines

-- name: lock_pool
SELECT pg_advisory_xact_lock(hashtextextended('warm_pool:' || %(node)s, 0))

-- name: fill
-- How full the pool is, and whether the boot of a member has failed of late.
SELECT count(*) AS members, count(*) FILTER (WHERE status <> 'running') AS booting,
    EXISTS (
        SELECT FROM operations o
        WHERE o.node = %(node)s AND o.product_id IS NULL AND outcome = 'failed'
            AND finished_at > clock_timestamp() - make_interval(secs => %(pause_s)s)) AS failing
FROM engines
WHERE node = %(node)s AND product_id IS NULL AND status <> 'destroying'
