-- name: insert_product
INSERT INTO products (product_id, slug, max_engines, rate_limit_rpm, allowed_images)
VALUES (%(product_id)s, %(slug)s, %(max_engines)s, %(rate_limit_rpm)s, %(allowed_images)s)
ON CONFLICT (slug) DO NOTHING

-- name: insert_rate_limiter
INSERT INTO rate_limiters (product_id) VALUES (%(product_id)s)

-- name: insert_platform_key
INSERT INTO platform_keys (key_hash, product_id) VALUES (%(key_hash)s, %(product_id)s)

-- name: update_policy
UPDATE products
SET max_engines = %(max_engines)s, rate_limit_rpm = %(rate_limit_rpm)s, allowed_images = %(allowed_images)s
WHERE product_id = %(product_id)s

-- name: product_by_key
SELECT product_id, slug, max_engines, rate_limit_rpm, allowed_images
FROM platform_keys JOIN products USING (product_id)
WHERE key_hash = %(key_hash)s

-- name: lock_product
-- Not FOR UPDATE: references to the product may go on being inserted.
SELECT product_id, slug, max_engines, rate_limit_rpm, allowed_images
FROM products
WHERE product_id = %(product_id)s
FOR NO KEY UPDATE

-- name: count_engines
SELECT count(*) AS engines FROM engines WHERE product_id = %(product_id)s

-- name: insert_audit_event
INSERT INTO audit_events (action, actor, outcome, product_id) VALUES (%(action)s, %(actor)s, 'succeeded', %(product_id)s)
