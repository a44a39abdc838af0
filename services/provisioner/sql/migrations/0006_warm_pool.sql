-- The warm pool: engines that are booted ahead and belong to nobody yet.

-- A row without an owner is a member of the pool. It gets one once, and never loses it.
ALTER TABLE engines
    ALTER COLUMN product_id DROP NOT NULL,
    ALTER COLUMN user_id DROP NOT NULL,
    ADD CONSTRAINT engines_owner CHECK ((product_id IS NULL) = (user_id IS NULL));
CREATE INDEX engines_unowned ON engines (node, status) WHERE product_id IS NULL;

ALTER TABLE operations
    ALTER COLUMN product_id DROP NOT NULL,
    ALTER COLUMN user_id DROP NOT NULL;
-- What makes the pool pause: boots of members that failed of late.
CREATE INDEX operations_unowned_failed ON operations (node, finished_at) WHERE product_id IS NULL AND outcome = 'failed';

-- Members count for no product; a claimed one counts from the claim on.
CREATE OR REPLACE FUNCTION count_engine() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') AND OLD.product_id IS NOT NULL THEN
        INSERT INTO counts VALUES (OLD.product_id, 'engines:' || OLD.status, -1);
    END IF;
    IF TG_OP IN ('UPDATE', 'INSERT') AND NEW.product_id IS NOT NULL THEN
        INSERT INTO counts VALUES (NEW.product_id, 'engines:' || NEW.status, 1);
    END IF;
    RETURN NULL;
END
$$;
DROP TRIGGER engines_recounted ON engines;
CREATE TRIGGER engines_recounted AFTER UPDATE OF status, product_id ON engines
    FOR EACH ROW WHEN ((OLD.status, OLD.product_id) IS DISTINCT FROM (NEW.status, NEW.product_id))
    EXECUTE FUNCTION count_engine();
