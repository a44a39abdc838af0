-- name: platform_keys
SELECT key_hash, product_id, rate_limit_rpm, max_keep_awake_s,
    extract(epoch FROM expires_at - clock_timestamp())::double precision AS seconds_left
FROM platform_keys JOIN products USING (product_id)
WHERE key_hash = ANY(%(key_hashes)s) AND disabled_at IS NULL
    AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: engines
SELECT product_id, engine_id, user_id, status, url, encrypted_key, image, created_at, last_health_at,
    EXISTS (
        SELECT FROM operations o
        WHERE o.engine_id = engines.engine_id AND finished_at IS NULL AND kind IN ('provision', 'start', 'wake', 'restart')
    ) AS booting
FROM unnest(%(product_ids)s::uuid[], %(user_ids)s::text[]) AS wanted (product_id, user_id)
JOIN engines USING (product_id, user_id)

-- name: clock
SELECT clock_timestamp() AS at

-- name: changes
-- What transactions from an id on have changed, and the id from which to ask the next time: all
-- below it have ended, and are seen by this or never. One row at least.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text AS next, change_id, product_id, user_id
FROM (SELECT) AS one
LEFT JOIN changes ON xact >= %(since)s::xid8
