-- name: product_by_key
SELECT product_id, rate_limit_rpm, max_keep_awake_s
FROM platform_keys JOIN products USING (product_id)
WHERE key_hash = %(key_hash)s AND disabled_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: engine
SELECT engine_id, user_id, status, url, encrypted_key, image, created_at, last_health_at,
    EXISTS (
        SELECT FROM operations o
        WHERE o.engine_id = engines.engine_id AND finished_at IS NULL AND kind IN ('provision', 'start', 'wake', 'restart')
    ) AS booting
FROM engines
WHERE product_id = %(product_id)s AND user_id = %(user_id)s

-- name: take_token
SELECT take_token(%(product_id)s, %(rate_limit_rpm)s, make_interval(secs => %(window_s)s)) AS wait_s
