-- The call that asked for an operation: those who carry it out log under its request id, and go on
-- with its trace.
ALTER TABLE operations
    ADD COLUMN request_id text,
    ADD COLUMN traceparent text;

-- An operation that was open for longer than 24 days, as one in quarantine may be, could not be ended:
-- its milliseconds are too many for the column.
CREATE OR REPLACE FUNCTION audit_operation(operation operations, p_detail text) RETURNS void LANGUAGE plpgsql AS $$
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
        -- Of one that has not ended there is none: least() would make the most of that.
        CASE WHEN operation.finished_at IS NOT NULL
            THEN least(extract(epoch FROM operation.finished_at - operation.created_at) * 1000, 2147483647)::integer END,
        operation.error_code,
        coalesce(p_detail, operation.error_message,
            CASE WHEN operation.kind = 'deep_sleep' THEN 'stopped to free its memory' END)
    WHERE operation.product_id IS NOT NULL;
END
$$;
