-- name: engine
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE engine_id = %(engine_id)s

-- name: engine_of_user
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE product_id = %(product_id)s AND user_id = %(user_id)s

-- name: engines_of_node
SELECT engines.*, port
FROM engines LEFT JOIN port_leases USING (engine_id, node)
WHERE node = %(node)s

-- name: lock_engine
SELECT engine_id FROM engines WHERE engine_id = %(engine_id)s FOR UPDATE

-- name: insert_engine
INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)
VALUES (%(engine_id)s, %(product_id)s, %(user_id)s, 'provisioning', %(image)s, %(node)s, '', %(encrypted_key)s)

-- name: set_status
UPDATE engines SET status = %(status)s WHERE engine_id = %(engine_id)s

-- name: set_running
UPDATE engines SET status = 'running', last_health_at = clock_timestamp() WHERE engine_id = %(engine_id)s

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
        WHERE a.node = %(node)s AND a.port = port.port AND a.until > clock_timestamp())
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
INSERT INTO ports_set_aside (node, port, until)
VALUES (%(node)s, %(port)s, clock_timestamp() + make_interval(secs => %(seconds)s))
ON CONFLICT (node, port) DO UPDATE SET until = excluded.until
