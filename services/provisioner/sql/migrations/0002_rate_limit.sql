-- The rate limiter. A product's grants are numbered; grant n is allowed once grant n - limit is a
-- window old. So any two grants n and n + limit are at least a window apart, which is the limit
-- itself, and one look-up by primary key decides.

CREATE TABLE rate_limiters (
    product_id uuid PRIMARY KEY REFERENCES products,
    last_grant bigint NOT NULL DEFAULT 0,
    -- Time here never goes back, even if the host's clock does.
    last_at timestamptz NOT NULL DEFAULT '-infinity'
);

CREATE TABLE rate_grants (
    product_id uuid NOT NULL REFERENCES rate_limiters,
    grant_no bigint NOT NULL,
    granted_at timestamptz NOT NULL,
    PRIMARY KEY (product_id, grant_no)
);

-- Takes one token. Returns null if granted, else the seconds after which one is free.
-- Each statement sees what was committed before it began, so all that follows the lock sees the
-- grants of those who held it before; and clock_timestamp() is read after the lock, because now()
-- would be the moment before the wait.
CREATE FUNCTION take_token(p_product_id uuid, p_limit integer, p_window interval) RETURNS double precision
LANGUAGE plpgsql AS $$
DECLARE
    limiter rate_limiters;
    at timestamptz;
    free_at timestamptz;
BEGIN
    SELECT * INTO limiter FROM rate_limiters WHERE product_id = p_product_id FOR UPDATE;
    at := greatest(clock_timestamp(), limiter.last_at);
    SELECT granted_at + p_window INTO free_at
        FROM rate_grants WHERE product_id = p_product_id AND grant_no = limiter.last_grant + 1 - p_limit;
    IF free_at > at THEN
        RETURN extract(epoch FROM free_at - at);
    END IF;
    INSERT INTO rate_grants VALUES (p_product_id, limiter.last_grant + 1, at);
    UPDATE rate_limiters SET last_grant = limiter.last_grant + 1, last_at = at WHERE product_id = p_product_id;
    -- What is older than the window decides nothing under any limit. Two out for one in: no backlog.
    DELETE FROM rate_grants WHERE product_id = p_product_id AND grant_no IN (
        SELECT grant_no FROM rate_grants WHERE product_id = p_product_id AND granted_at <= at - p_window
        ORDER BY grant_no LIMIT 2);
    RETURN NULL;
END
$$;
