-- name: node_engines
-- Those with an owner: what is in the warm pool is nobody's, and made anew.
SELECT engine_id FROM engines
WHERE node = %(node)s AND product_id IS NOT NULL AND status <> 'destroying' ORDER BY created_at

-- name: other_nodes
SELECT DISTINCT node FROM engines WHERE node <> %(node)s ORDER BY node

-- name: own_operation
UPDATE operations
SET owner = %(owner)s, lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s), attempts = 1
WHERE operation_id = %(operation_id)s

-- name: renew_operation
UPDATE operations SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
WHERE operation_id = %(operation_id)s AND owner = %(owner)s AND finished_at IS NULL AND lease_until > clock_timestamp()

-- name: contents
-- What is in the registry at the moment of the snapshot, for the manifest.
SELECT
    (SELECT installation_id FROM installation) AS installation_id,
    (SELECT array_agg(name ORDER BY name) FROM schema_migrations) AS migrations,
    (SELECT count(*) FROM products) AS products,
    (SELECT coalesce(array_agg(engine_id ORDER BY engine_id), '{}') FROM engines WHERE status <> 'destroying') AS engines,
    (SELECT coalesce(array_agg(DISTINCT concat_ws(' ', image, image_id)), '{}') FROM engines
        WHERE product_id IS NOT NULL) AS images
