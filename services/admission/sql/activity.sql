-- name: flush
-- All of it or nothing. In the order of ids, so that two replicas never wait for each other in a
-- circle. An engine that is gone is forgotten.
WITH uses AS (
    INSERT INTO engine_activity (engine_id, last_admit_at, keep_awake_until)
    SELECT engine_id, clock_timestamp() - make_interval(secs => age_s),
        CASE WHEN awake_s > 0 THEN clock_timestamp() + make_interval(secs => awake_s) END
    FROM (
        SELECT engines.engine_id, age_s, awake_s
        FROM unnest(%(engine_ids)s::uuid[], %(ages_s)s::double precision[], %(awake_s)s::double precision[])
            AS use (engine_id, age_s, awake_s)
        JOIN engines USING (engine_id)
        ORDER BY engine_id
        FOR KEY SHARE OF engines
    ) AS known
    ON CONFLICT (engine_id) DO UPDATE
    SET last_admit_at = greatest(engine_activity.last_admit_at, excluded.last_admit_at),
        keep_awake_until = greatest(engine_activity.keep_awake_until, excluded.keep_awake_until)
), denials AS (
    INSERT INTO admit_denials (product_id, reason, minute, denials)
    SELECT product_id, reason, date_trunc('minute', clock_timestamp()), count
    FROM unnest(%(product_ids)s::uuid[], %(reasons)s::text[], %(counts)s::integer[])
        AS denial (product_id, reason, count)
    ORDER BY product_id, reason
    ON CONFLICT (minute, product_id, reason) DO UPDATE SET denials = admit_denials.denials + excluded.denials
)
INSERT INTO admission_replicas (replica_id, flushed_at)
VALUES (%(replica_id)s, %(flushed_at)s)
ON CONFLICT (replica_id) DO UPDATE SET flushed_at = excluded.flushed_at

-- name: forget_replica
DELETE FROM admission_replicas
WHERE replica_id = %(replica_id)s OR flushed_at < clock_timestamp() - interval '1 day'

-- name: bury_replica
UPDATE admission_replicas SET died_at = clock_timestamp() WHERE replica_id = %(replica_id)s AND died_at IS NULL
