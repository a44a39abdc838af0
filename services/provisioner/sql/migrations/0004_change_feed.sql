-- The change feed: what readers of the registry may have remembered and must look up again.

-- A reader that has seen all transactions below some id asks for those from there on, so that a
-- transaction that commits late is not missed, however long it took.
CREATE TABLE changes (
    change_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xact xid8 NOT NULL DEFAULT pg_current_xact_id(),
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    product_id uuid NOT NULL,
    -- Whose engine; null if it is the product itself: its policy, its keys, whether it is enabled.
    user_id text
);
CREATE INDEX changes_xact ON changes (xact);
CREATE INDEX changes_at ON changes (at);

-- The notification says what the row says. It only makes readers quick: some are lost.
CREATE FUNCTION note_change(p_product_id uuid, p_user_id text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO changes (product_id, user_id) VALUES (p_product_id, p_user_id);
    PERFORM pg_notify('changes', concat_ws(' ', p_product_id, p_user_id));
END
$$;

-- An engine without a product has no reader.
CREATE FUNCTION engine_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP IN ('UPDATE', 'DELETE') AND OLD.product_id IS NOT NULL THEN
        PERFORM note_change(OLD.product_id, OLD.user_id);
    END IF;
    IF TG_OP = 'INSERT' AND NEW.product_id IS NOT NULL
        OR TG_OP = 'UPDATE' AND OLD.product_id IS NULL AND NEW.product_id IS NOT NULL THEN
        PERFORM note_change(NEW.product_id, NEW.user_id);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER engines_added_or_removed AFTER INSERT OR DELETE ON engines
    FOR EACH ROW EXECUTE FUNCTION engine_changed();
CREATE TRIGGER engines_changed AFTER UPDATE OF product_id, user_id, status, url, encrypted_key, image ON engines
    FOR EACH ROW WHEN (
        (OLD.product_id, OLD.user_id, OLD.status, OLD.url, OLD.encrypted_key, OLD.image)
        IS DISTINCT FROM (NEW.product_id, NEW.user_id, NEW.status, NEW.url, NEW.encrypted_key, NEW.image))
    EXECUTE FUNCTION engine_changed();

-- Whether an engine is booting is told by its open operation.
CREATE FUNCTION boot_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.product_id IS NOT NULL THEN
        PERFORM note_change(NEW.product_id, NEW.user_id);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER boots_begun AFTER INSERT ON operations
    FOR EACH ROW WHEN (NEW.kind IN ('provision', 'start', 'wake', 'restart')) EXECUTE FUNCTION boot_changed();
CREATE TRIGGER boots_ended AFTER UPDATE OF finished_at ON operations
    FOR EACH ROW WHEN (NEW.kind IN ('provision', 'start', 'wake', 'restart')) EXECUTE FUNCTION boot_changed();

CREATE FUNCTION product_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM note_change(coalesce(NEW.product_id, OLD.product_id), NULL);
    RETURN NULL;
END
$$;
CREATE TRIGGER products_changed AFTER UPDATE ON products FOR EACH ROW EXECUTE FUNCTION product_changed();
CREATE TRIGGER platform_keys_changed AFTER INSERT OR UPDATE OR DELETE ON platform_keys
    FOR EACH ROW EXECUTE FUNCTION product_changed();

-- What transactions from an id on have changed, and the id from which to ask the next time: all
-- below it have ended, and are seen by this or never. One row at least. A function that is volatile
-- reads anew with each of its statements: what was committed before `at` is seen by the second.
CREATE FUNCTION read_changes(p_since xid8)
RETURNS TABLE (at timestamptz, next text, change_id bigint, product_id uuid, user_id text)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_at timestamptz := clock_timestamp();
BEGIN
    RETURN QUERY
        SELECT v_at, pg_snapshot_xmin(pg_current_snapshot())::text, c.change_id, c.product_id, c.user_id
        FROM (SELECT) AS one LEFT JOIN changes c ON c.xact >= p_since;
END
$$;

-- When a replica was found to have died with admits that it had not told of. Until engines have
-- been idle for long since then, nobody knows that they were.
ALTER TABLE admission_replicas ADD COLUMN died_at timestamptz;

-- Until when replicas may have made admits that nobody will tell of: those that died, and those that
-- are silent. A silent one goes on for so long without the registry, and a little from when it last
-- read the feed to when it could not flush.
CREATE FUNCTION untold_until(p_stale_ok interval) RETURNS timestamptz LANGUAGE sql AS $$
    SELECT max(coalesce(died_at, CASE WHEN flushed_at < clock_timestamp() - interval '10 seconds' THEN
        least(clock_timestamp(), flushed_at + p_stale_ok + interval '10 seconds') END))
    FROM admission_replicas
$$;
