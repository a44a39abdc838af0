-- name: insert_product
INSERT INTO products (
    product_id, slug, max_engines, rate_limit_rpm, allowed_images, idle_sleep_after_s, max_keep_awake_s)
VALUES (
    %(product_id)s, %(slug)s, %(max_engines)s, %(rate_limit_rpm)s, %(allowed_images)s, %(idle_sleep_after_s)s,
    %(max_keep_awake_s)s)
ON CONFLICT (slug) DO NOTHING

-- name: insert_rate_limiter
INSERT INTO rate_limiters (product_id) VALUES (%(product_id)s)

-- name: insert_platform_key
INSERT INTO platform_keys (key_hash, product_id) VALUES (%(key_hash)s, %(product_id)s)

-- name: expire_platform_keys
-- A key that ends sooner already still does.
UPDATE platform_keys SET expires_at = clock_timestamp() + make_interval(secs => %(grace_s)s)
WHERE product_id = %(product_id)s
    AND (expires_at IS NULL OR expires_at > clock_timestamp() + make_interval(secs => %(grace_s)s))

-- name: update_policy
UPDATE products
SET max_engines = %(max_engines)s, rate_limit_rpm = %(rate_limit_rpm)s, allowed_images = %(allowed_images)s,
    idle_sleep_after_s = %(idle_sleep_after_s)s, max_keep_awake_s = %(max_keep_awake_s)s
WHERE product_id = %(product_id)s

-- name: disable_product
UPDATE products SET disabled_at = clock_timestamp() WHERE product_id = %(product_id)s AND disabled_at IS NULL

-- name: enable_product
UPDATE products SET disabled_at = NULL WHERE product_id = %(product_id)s AND disabled_at IS NOT NULL

-- name: product
SELECT product_id, slug, max_engines, rate_limit_rpm, allowed_images, idle_sleep_after_s, max_keep_awake_s,
    created_at, disabled_at
FROM products
WHERE product_id = %(product_id)s

-- name: products
SELECT product_id, slug, max_engines, rate_limit_rpm, allowed_images, idle_sleep_after_s, max_keep_awake_s,
    created_at, disabled_at
FROM products
WHERE slug > %(after)s
ORDER BY slug
LIMIT %(limit)s

-- name: product_by_key
SELECT product_id, slug, max_engines, rate_limit_rpm, allowed_images, idle_sleep_after_s, max_keep_awake_s
FROM platform_keys JOIN products USING (product_id)
WHERE key_hash = %(key_hash)s AND disabled_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())

-- name: lock_product
-- Not FOR UPDATE: references to the product may go on being inserted.
SELECT product_id, slug, max_engines, rate_limit_rpm, allowed_images, idle_sleep_after_s, max_keep_awake_s
FROM products
WHERE product_id = %(product_id)s
FOR NO KEY UPDATE

-- name: room
-- To be asked under the product's lock: engines are added under it alone, and each is counted in
-- the transaction that adds it, so that the sum is what there is, and is read in no time.
SELECT
    coalesce((SELECT sum(n) FROM counts WHERE product_id = %(product_id)s AND name LIKE 'engines:%%'), 0)::bigint
        AS engines,
    EXISTS (SELECT FROM engines WHERE product_id = %(product_id)s AND user_id = %(user_id)s) AS exists

-- name: insert_audit_event
INSERT INTO audit_events (action, actor, outcome, product_id, detail)
VALUES (%(action)s, %(actor)s, 'succeeded', %(product_id)s, %(detail)s)
