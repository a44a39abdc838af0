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

-- name: changes
SELECT at, next, incarnation, change_id, product_id, user_id FROM read_changes(%(since)s::xid8), installation
