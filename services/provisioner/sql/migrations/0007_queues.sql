-- Operations wait in queues by what they need, and tell the audit log of their beginning and end themselves.

-- The outcome is `requested` for an open operation. Automatic restarts have actions of their own,
-- one for each thing that may come of them. What happens to an engine that is nobody's is not told.
CREATE FUNCTION audit_operation(operation operations, p_detail text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_events (action, actor, outcome, product_id, engine_id, user_id, duration_ms, error_code, detail)
    SELECT
        CASE operation.kind
            WHEN 'restart' THEN CASE operation.outcome
                WHEN 'succeeded' THEN 'auto_restart_success'
                WHEN 'failed' THEN 'auto_restart_failed'
                WHEN 'cancelled' THEN 'auto_restart_failed'
                ELSE 'auto_restart_start' END
            WHEN 'deep_sleep' THEN 'sleep'
            ELSE operation.kind END,
        operation.actor, coalesce(operation.outcome, 'requested'),
        operation.product_id, operation.engine_id, operation.user_id,
        (extract(epoch FROM operation.finished_at - operation.created_at) * 1000)::integer, operation.error_code,
        coalesce(p_detail, operation.error_message,
            CASE WHEN operation.kind = 'deep_sleep' THEN 'stopped to free its memory' END)
    WHERE operation.product_id IS NOT NULL;
END
$$;

-- What an operation waits in line for: `boot` for a place to start an instance in, of which there
-- are few; `sleep` for one of those that go to engines falling asleep, which mostly wait; `other`
-- for one of those that hardly ever are all taken.
ALTER TABLE operations ADD COLUMN queue text NOT NULL DEFAULT 'other';
UPDATE operations SET queue = CASE WHEN kind IN ('sleep', 'deep_sleep') THEN 'sleep' ELSE 'boot' END
WHERE finished_at IS NULL AND kind IN ('provision', 'start', 'restart', 'sleep', 'deep_sleep');

DROP INDEX operations_queue;
CREATE INDEX operations_queue ON operations (node, queue, product_id, not_before)
    WHERE finished_at IS NULL AND quarantined_at IS NULL;
CREATE INDEX operations_under_way ON operations (node, queue)
    WHERE finished_at IS NULL AND quarantined_at IS NULL AND owner IS NOT NULL;

-- Finds those that have been over for so long that they are dropped.
CREATE INDEX operations_finished ON operations (finished_at) WHERE finished_at IS NOT NULL;
