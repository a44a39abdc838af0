-- name: kept
SELECT request_hash, answer FROM idempotency_keys
WHERE key_id = %(key_id)s AND begun_at > clock_timestamp() - interval '24 hours'

-- name: forget
DELETE FROM idempotency_keys
WHERE key_id = %(key_id)s AND begun_at <= clock_timestamp() - interval '24 hours'

-- name: claim
-- Waits for the transaction of another call with the key, and sees what has come of it.
INSERT INTO idempotency_keys AS known (key_id, request_hash) VALUES (%(key_id)s, %(request_hash)s)
ON CONFLICT (key_id) DO UPDATE SET request_hash = known.request_hash
RETURNING request_hash, operation_id, answer

-- name: begun
-- What failed or gave way has changed nothing, and may be begun again.
SELECT operation_id, engine_id FROM operations
WHERE operation_id = %(operation_id)s AND (%(in_vain)s OR outcome IS NULL OR outcome = 'succeeded')

-- name: note_operation
UPDATE idempotency_keys SET operation_id = %(operation_id)s, begun_at = clock_timestamp() WHERE key_id = %(key_id)s

-- name: keep
-- Of two answers the first stays. No row if the key's time is over.
UPDATE idempotency_keys SET answer = coalesce(answer, %(answer)s)
WHERE key_id = %(key_id)s AND request_hash = %(request_hash)s
RETURNING answer

-- name: drop_expired
-- The condition stands twice: a row may have been begun anew before its lock was got.
DELETE FROM idempotency_keys
WHERE begun_at <= clock_timestamp() - interval '24 hours' AND key_id IN (
    SELECT key_id FROM idempotency_keys
    WHERE begun_at <= clock_timestamp() - interval '24 hours'
    ORDER BY begun_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED)
