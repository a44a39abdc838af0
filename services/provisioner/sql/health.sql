-- name: running_engines
-- Those that are as they should stay: an open operation decides for itself, and the warm pool for
-- its members.
SELECT engine_id, url, health_failures AS failures, status_since AS since
FROM engines
WHERE node = %(node)s AND status = 'running' AND product_id IS NOT NULL
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)

-- name: mark_well
-- Rows that somebody is changing are passed over: their next probe will do.
UPDATE engines
SET last_health_at = clock_timestamp(), health_failures = 0,
    restart_attempts = CASE WHEN status_since + make_interval(secs => %(backoff_max_s)s) < clock_timestamp()
        THEN 0 ELSE restart_attempts END
FROM (
    SELECT engine_id FROM engines
    WHERE engine_id = ANY(%(engine_ids)s) AND status = 'running'
    FOR NO KEY UPDATE SKIP LOCKED
) AS well
WHERE engines.engine_id = well.engine_id

-- name: count_failure
-- Nothing if the engine is no longer the one that was probed. Its row is locked already.
UPDATE engines SET health_failures = health_failures + 1
WHERE engine_id = %(engine_id)s AND status = 'running' AND status_since = %(since)s
    AND health_failures = %(failures)s
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)
RETURNING health_failures

-- name: insert_audit_event
INSERT INTO audit_events (action, actor, outcome, product_id, engine_id, user_id, detail)
SELECT %(action)s, %(actor)s, 'failed', product_id, engine_id, user_id, %(reason)s
FROM engines WHERE engine_id = %(engine_id)s

-- name: due_restarts
-- Nothing waits for longer than the longest pause: such moments are of before the clock was set back.
SELECT engine_id FROM engines
WHERE node = %(node)s AND status = 'failed'
    AND restart_at NOT BETWEEN clock_timestamp() AND clock_timestamp() + make_interval(secs => %(backoff_max_s)s)
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)
ORDER BY restart_at
LIMIT %(limit)s
