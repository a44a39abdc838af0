-- name: tokens
-- Of a column, by the id that each is bound to.
SELECT {id} AS id, {column} AS token
FROM {table}
WHERE {column} IS NOT NULL AND {id} > %(after)s
ORDER BY {id}
LIMIT %(limit)s

-- name: count
SELECT count({column}) AS tokens FROM {table}

-- name: rekeying
-- Until the transaction's end no change is told of.
SELECT set_config('september.rekeying', 'on', true)

-- name: replace
-- Those that are still what they were. Locked in the order of ids, so that two who do this at once
-- never wait for each other in a circle.
UPDATE {table} SET {column} = locked.new
FROM (
    SELECT token.*
    FROM unnest(%(ids)s::uuid[], %(old)s::bytea[], %(new)s::bytea[]) AS token (id, old, new)
    JOIN {table} ON {table}.{id} = token.id
    ORDER BY token.id
    FOR NO KEY UPDATE OF {table}
) AS locked
WHERE {table}.{id} = locked.id AND {table}.{column} = locked.old
