-- Idempotency keys: what calls that showed one have begun, and what they were answered.

-- A row is written in the transaction that begins what the call asks for, so that either both are
-- there or neither.
CREATE TABLE idempotency_keys (
    -- Made of the caller and its key.
    key_id uuid PRIMARY KEY,
    -- Of the method and its request; another request with the key is refused.
    request_hash bytea NOT NULL CHECK (length(request_hash) = 32),
    begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Whose end the call waits for; null if the call is a single transaction, or could not begin yet.
    operation_id uuid,
    -- Encrypted: it may have a key that is shown once. Null until there is one, and errors are none.
    answer bytea
);
CREATE INDEX idempotency_keys_begun ON idempotency_keys (begun_at);
