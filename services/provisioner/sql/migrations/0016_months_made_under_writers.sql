-- A writer who was on the way to the default partition while the month of its event was made failed:
-- the event was no longer allowed there. The month is made as before, but while it may be written to,
-- writers are held up, and therefore for no more than a moment.
CREATE OR REPLACE FUNCTION make_audit_partitions() RETURNS SETOF text
LANGUAGE plpgsql SET timezone = 'UTC' SET lock_timeout = '1s' AS $$
DECLARE
    month timestamptz;
    part text;
BEGIN
    LOCK TABLE audit_events IN SHARE UPDATE EXCLUSIVE MODE;
    -- As an array: a table that a query is reading can't be altered.
    FOREACH month IN ARRAY ARRAY(
        SELECT date_trunc('month', clock_timestamp()) + make_interval(months => i) FROM generate_series(0, 1) AS i
        UNION SELECT date_trunc('month', at) FROM audit_events_other)
    LOOP
        part := 'audit_events_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass(part) IS NOT NULL;
        -- A day more at both ends, for a clock that is set.
        IF clock_timestamp() BETWEEN month - interval '1 day' AND month + interval '1 month 1 day' THEN
            LOCK TABLE audit_events IN SHARE ROW EXCLUSIVE MODE;
        END IF;
        EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS)', part);
        -- From here until the end nobody writes to the default partition.
        ALTER TABLE audit_events_other DISABLE TRIGGER USER;
        EXECUTE format(
            'WITH moved AS (DELETE FROM audit_events_other WHERE at >= %L AND at < %L RETURNING *)'
            ' INSERT INTO %I SELECT * FROM moved', month, month + interval '1 month', part);
        ALTER TABLE audit_events_other ENABLE TRIGGER USER;
        EXECUTE format(
            'ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            part, month, month + interval '1 month');
        EXECUTE format(
            'CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON %I'
            ' FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', part);
        RETURN NEXT part;
    END LOOP;
END
$$;
