-- name: engine
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE engine_id = %(engine_id)s

-- name: engine_of_user
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE product_id = %(product_id)s AND user_id = %(user_id)s

-- name: lock_engine
-- The engine as it is once the lock was had; its port may be that from before the wait.
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE engine_id = %(engine_id)s
FOR UPDATE OF engines

-- name: lock_engine_of_user
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE product_id = %(product_id)s AND user_id = %(user_id)s
FOR UPDATE OF engines

-- name: insert_engine
INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)
VALUES (%(engine_id)s, %(product_id)s, %(user_id)s, 'provisioning', %(image)s, %(node)s, '', %(encrypted_key)s)

-- name: set_status
UPDATE engines SET status = %(status)s, status_reason = %(reason)s WHERE engine_id = %(engine_id)s

-- name: set_running
UPDATE engines
SET status = 'running', status_reason = NULL, deep_asleep = false, last_health_at = clock_timestamp(),
    health_failures = 0, restart_at = NULL,
    restart_attempts = CASE WHEN %(afresh)s THEN 0 ELSE restart_attempts + %(tried)s END
WHERE engine_id = %(engine_id)s

-- name: set_asleep
UPDATE engines SET status = 'sleeping', status_reason = %(reason)s, deep_asleep = %(deep)s
WHERE engine_id = %(engine_id)s

-- name: set_busy
-- Back from falling asleep: the engine was wanted, or at work.
UPDATE engines
SET status = 'running', status_reason = NULL, busy_at = clock_timestamp(), busy_reason = %(reason)s
WHERE engine_id = %(engine_id)s

-- name: set_failed
-- The next restart is due after a pause that doubles; none after the last attempt.
UPDATE engines
SET status = 'failed', status_reason = %(reason)s,
    restart_attempts = restart_attempts + %(tried)s,
    restart_at = CASE WHEN restart_attempts + %(tried)s < %(max_attempts)s THEN
        clock_timestamp() + make_interval(
            secs => least(%(backoff_base_s)s * 2.0 ^ (restart_attempts + %(tried)s), %(backoff_max_s)s)) END
WHERE engine_id = %(engine_id)s
RETURNING restart_at IS NULL AS given_up

-- name: set_pending_key
-- Kept if there is one already: the engine may know it.
UPDATE engines SET pending_key = coalesce(pending_key, %(pending_key)s) WHERE engine_id = %(engine_id)s

-- name: commit_pending_key
-- The next instance is a new one, because this one was made with the old key's hash.
UPDATE engines SET encrypted_key = pending_key, pending_key = NULL, generation = generation + 1
WHERE engine_id = %(engine_id)s AND pending_key IS NOT NULL

-- name: drop_pending_key
UPDATE engines SET pending_key = NULL, generation = generation + 1
WHERE engine_id = %(engine_id)s AND pending_key IS NOT NULL

-- name: set_url
UPDATE engines SET url = %(url)s WHERE engine_id = %(engine_id)s

-- name: delete_engine
DELETE FROM engines WHERE engine_id = %(engine_id)s

-- name: free_port
SELECT port
FROM generate_series(%(port_min)s::integer, %(port_max)s::integer) AS port
WHERE NOT EXISTS (SELECT FROM port_leases l WHERE l.node = %(node)s AND l.port = port.port)
    AND NOT EXISTS (
        SELECT FROM ports_set_aside a
        WHERE a.node = %(node)s AND a.port = port.port
            AND a.until BETWEEN clock_timestamp() AND clock_timestamp() + interval '1 minute')
ORDER BY random()
LIMIT 1

-- name: lease_port
-- Of two who choose the same port the second waits for the first's commit, and then gets no row.
INSERT INTO port_leases (node, port, engine_id) VALUES (%(node)s, %(port)s, %(engine_id)s)
ON CONFLICT (node, port) DO NOTHING
RETURNING port

-- name: release_port
DELETE FROM port_leases WHERE engine_id = %(engine_id)s

-- name: set_port_aside
-- Long enough for whatever held the port to end, short enough not to starve a small range. What is
-- set aside for longer is of before the clock was set back.
INSERT INTO ports_set_aside (node, port, until)
VALUES (%(node)s, %(port)s, clock_timestamp() + interval '1 minute')
ON CONFLICT (node, port) DO UPDATE SET until = excluded.until

-- name: wanted
-- Whether the engine was admitted to since its sleep was decided, or is being kept awake. The
-- platform's own decision rested on how long the engine had been idle before; by request it is
-- only not put to sleep under those who have just been let in.
SELECT
    coalesce(greatest(last_admit_at, (SELECT untold_until(make_interval(secs => %(stale_ok_s)s))))
        > operations.created_at - make_interval(
            secs => CASE actor WHEN 'system' THEN coalesce(idle_sleep_after_s, 0) ELSE 1 END), false) AS admitted,
    coalesce(keep_awake_until > clock_timestamp(), false) AS held
FROM operations
JOIN products USING (product_id)
LEFT JOIN engine_activity USING (engine_id)
WHERE operation_id = %(operation_id)s

-- name: note_admit
INSERT INTO engine_activity (engine_id, last_admit_at) VALUES (%(engine_id)s, clock_timestamp())
ON CONFLICT (engine_id) DO UPDATE SET last_admit_at = excluded.last_admit_at

-- name: unflushed_replicas
-- Replicas that may still have admits from before a moment to tell of. A dead one tells nothing any
-- more, and neither does one that was not heard of for longer than it may go on without the registry.
SELECT count(*) AS replicas FROM admission_replicas
WHERE died_at IS NULL AND flushed_at <= %(since)s
    AND flushed_at > clock_timestamp() - make_interval(secs => %(stale_ok_s)s) - interval '10 seconds'

-- name: idle_engines
-- Running engines of a node that show no sign of work for as long as their policy says.
SELECT engines.*, port
FROM engines
JOIN products USING (product_id)
LEFT JOIN engine_activity USING (engine_id)
LEFT JOIN port_leases USING (engine_id, node)
WHERE engines.node = %(node)s AND engines.status = 'running' AND idle_sleep_after_s IS NOT NULL
    AND greatest(status_since, last_admit_at, busy_at, (SELECT untold_until(make_interval(secs => %(stale_ok_s)s))))
        + make_interval(secs => idle_sleep_after_s) < clock_timestamp()
    AND (keep_awake_until IS NULL OR keep_awake_until < clock_timestamp())
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)
ORDER BY status_since
LIMIT %(limit)s

-- name: light_sleepers
-- Frozen engines of a node that have slept long enough to give their memory back.
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE engines.node = %(node)s AND status = 'sleeping' AND NOT deep_asleep
    AND status_since + make_interval(secs => %(deep_sleep_after_s)s) < clock_timestamp()
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)
ORDER BY status_since
LIMIT %(limit)s

-- name: mark_busy
UPDATE engines SET busy_at = clock_timestamp(), busy_reason = %(reason)s
WHERE engine_id = %(engine_id)s AND status = 'running'
