-- name: engines
SELECT *
FROM (
    SELECT engine_id, product_id, user_id, status, url, image, created_at, last_health_at
    FROM engines
    WHERE {after} AND product_id IS NOT NULL
    ORDER BY {order}
    OFFSET %(offset)s
    LIMIT %(limit)s
) AS page
WHERE {within}
ORDER BY {order}

-- name: counts
SELECT name, sum(n)::bigint AS n FROM counts WHERE {scope} GROUP BY name

-- name: warm_pool
SELECT count(*) FILTER (WHERE status = 'running') AS ready, count(*) FILTER (WHERE status = 'provisioning') AS booting
FROM engines WHERE product_id IS NULL

-- name: past_hour
-- The long condition is that of the indexes, word for word.
SELECT
    count(*) FILTER (WHERE action = 'provision') AS provisions,
    count(*) FILTER (WHERE action = 'health_failed') AS crashes,
    count(*) FILTER (WHERE action = 'auto_restart_start') AS restarts,
    coalesce(avg(duration_ms) FILTER (WHERE action = 'provision'), 0)::double precision AS avg_boot_ms
FROM audit_events
WHERE {scope} AND at > statement_timestamp() - interval '1 hour'
    AND (action IN ('health_failed', 'auto_restart_start') OR (action = 'provision' AND outcome = 'succeeded'))

-- name: engine_report
SELECT engines.status, status_since, status_reason, deep_asleep, busy_at, busy_reason, restart_attempts, restart_at,
    idle_sleep_after_s, last_admit_at,
    CASE WHEN keep_awake_until > statement_timestamp() THEN keep_awake_until END AS keep_awake_until,
    o.kind AS operation, o.step, o.created_at AS operation_since, o.quarantined_at IS NOT NULL AS quarantined,
    -- Who brought about the status that it is in, if anybody did.
    (SELECT actor FROM operations
     WHERE operations.engine_id = engines.engine_id
        AND kind = CASE engines.status WHEN 'sleeping' THEN 'sleep' WHEN 'stopped' THEN 'stop' END
     ORDER BY created_at DESC LIMIT 1) AS status_by
FROM engines
JOIN products USING (product_id)
LEFT JOIN engine_activity USING (engine_id)
LEFT JOIN operations o ON o.engine_id = engines.engine_id AND o.finished_at IS NULL
WHERE engines.product_id = %(product_id)s AND engines.user_id = %(user_id)s

-- name: fold_counts
-- One row for many of the same count. Rows added meanwhile are not seen, and so are not lost; rows
-- that somebody else is folding are gone when their lock is. Readers see the rows or their sum.
WITH crowded AS (
    SELECT product_id, name FROM counts GROUP BY product_id, name HAVING count(*) > 1 OR sum(n) = 0
), folded AS (
    DELETE FROM counts WHERE ctid = ANY(ARRAY(
        SELECT counts.ctid FROM counts JOIN crowded USING (product_id, name) LIMIT %(limit)s))
    RETURNING product_id, name, n
), sums AS (
    INSERT INTO counts SELECT product_id, name, sum(n) FROM folded GROUP BY product_id, name HAVING sum(n) <> 0
)
SELECT count(*) AS folded FROM folded
