-- An engine key that is encrypted anew, under another master key, is the same key: whoever has read
-- it knows nothing less, and a fleet's worth of changes would make every reader look everything up.
DROP TRIGGER engines_changed ON engines;
CREATE TRIGGER engines_changed AFTER UPDATE OF product_id, user_id, status, url, encrypted_key, image ON engines
    FOR EACH ROW WHEN (
        (OLD.product_id, OLD.user_id, OLD.status, OLD.url, OLD.encrypted_key, OLD.image)
        IS DISTINCT FROM (NEW.product_id, NEW.user_id, NEW.status, NEW.url, NEW.encrypted_key, NEW.image)
        AND current_setting('september.rekeying', true) IS DISTINCT FROM 'on')
    EXECUTE FUNCTION engine_changed();
