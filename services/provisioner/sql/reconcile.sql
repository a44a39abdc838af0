-- name: registered_engines
-- Without those that have no instance and should have none.
SELECT engines.engine_id, status, deep_asleep, operation_id IS NOT NULL AS busy
FROM engines LEFT JOIN operations ON operations.engine_id = engines.engine_id AND finished_at IS NULL
WHERE engines.node = %(node)s
    AND (status IN ('running', 'provisioning', 'destroying') OR status = 'sleeping' AND NOT deep_asleep
        OR engines.engine_id = ANY(%(listed)s))

-- name: unknown_engines
-- Those of the given that no row and no open operation knows, on whatever node.
SELECT given.engine_id,
    EXISTS (
        SELECT FROM operations o
        WHERE o.engine_id = given.engine_id
            AND (kind = 'destroy' AND outcome = 'succeeded' OR kind = 'provision' AND outcome = 'failed')
    ) AS destroyed
FROM unnest(%(engine_ids)s::uuid[]) AS given (engine_id)
WHERE NOT EXISTS (SELECT FROM engines e WHERE e.engine_id = given.engine_id)
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = given.engine_id AND finished_at IS NULL)

-- name: set_deep_asleep
UPDATE engines SET deep_asleep = %(deep_asleep)s
WHERE engine_id = %(engine_id)s AND status = 'sleeping'
    AND NOT EXISTS (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)
