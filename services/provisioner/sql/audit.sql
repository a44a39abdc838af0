-- name: events
SELECT *
FROM (
    SELECT event_id, at, action, actor, outcome, product_id, engine_id, user_id, duration_ms, error_code, detail, count
    FROM audit_events
    WHERE {after}
    ORDER BY {order}
    LIMIT %(limit)s
) AS page
WHERE {within}
ORDER BY {order}

-- name: events_of_user
-- Few enough to be looked through for an action.
SELECT event_id, at, action, actor, outcome, product_id, engine_id, user_id, duration_ms, error_code, detail, count
FROM audit_events
WHERE product_id = %(product_id)s AND user_id = %(user_id)s AND event_id < %(event_id)s
    AND (%(action)s::text IS NULL OR action = %(action)s)
ORDER BY event_id DESC
LIMIT %(limit)s

-- name: make_partitions
SELECT make_audit_partitions() AS partition

-- name: drop_partitions
SELECT drop_audit_partitions(make_interval(days => %(kept_days)s)) AS partition

-- name: record_denials
-- Each minute that has been over for long enough that all who count have told of it. One who is
-- late all the same makes one more event of that minute.
WITH counted AS (
    DELETE FROM admit_denials
    WHERE minute <= clock_timestamp() - interval '3 minutes'
    RETURNING product_id, reason, minute, denials
)
INSERT INTO audit_events (at, action, actor, outcome, product_id, detail, count)
SELECT minute, 'admit_denied', 'product:' || slug, 'denied', product_id, reason, denials
FROM counted JOIN products USING (product_id)
ORDER BY minute

-- name: drop_operations
WITH dropped AS (
    DELETE FROM operations WHERE operation_id = ANY(ARRAY(
        SELECT operation_id FROM operations
        WHERE finished_at < clock_timestamp() - make_interval(days => %(kept_days)s)
        ORDER BY finished_at LIMIT %(limit)s))
    RETURNING operation_id
)
SELECT count(*) AS dropped FROM dropped
