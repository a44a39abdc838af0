-- The rate limit, leased. Each replica of Admission holds a share of a product's limit, counts its
-- own admits, and never makes more of them in a window than its share. The shares of a product add
-- up to the limit at most, so its admits do too.

-- One row by replica and product. A share counts until the replica has left, or can no longer be
-- alive without having been heard: from then on only the admits that it may still have in the window.
CREATE TABLE rate_shares (
    product_id uuid NOT NULL REFERENCES rate_limiters,
    replica_id uuid NOT NULL,
    -- No more admits in any window than this.
    share integer NOT NULL CHECK (share >= 0),
    -- What of it the replica needs; the rest is spare.
    need integer NOT NULL,
    -- How many admits it may have made, at most, that it has not made known: for some seconds after
    -- it was heard, a replica makes no more than it has said.
    unknown integer NOT NULL,
    -- How many admits were still in the window when it was heard, and one, two, ... slots later.
    lasting integer[] NOT NULL,
    heard_at timestamptz NOT NULL,
    until timestamptz NOT NULL,
    -- Since when it has had less than it needs, and until when that is believed.
    short_since timestamptz,
    short_until timestamptz,
    -- When it was known to make no more admits.
    left_at timestamptz,
    PRIMARY KEY (product_id, replica_id)
) WITH (fillfactor = 50);
CREATE INDEX rate_shares_replica ON rate_shares (replica_id) WHERE left_at IS NULL;

-- The last statement of each replica. One that was sent before and comes later changes nothing.
CREATE TABLE rate_replicas (
    replica_id uuid PRIMARY KEY,
    claim_no bigint NOT NULL,
    heard_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- By how much the clock of the host is ahead of the limiter's, after steps that a replica noticed.
CREATE TABLE rate_clock (
    ahead interval NOT NULL DEFAULT interval '0',
    -- How many steps there were, and since when, by the limiter's clock, moments are right again:
    -- those that were written between a step and its correction are wrong by it.
    step bigint NOT NULL DEFAULT 0,
    sure_from timestamptz NOT NULL DEFAULT '-infinity',
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one)
);
INSERT INTO rate_clock DEFAULT VALUES;

-- What a share that has not ended takes of the limit at a moment. Of one whose replica has left: the
-- admits that it made known and that are still in the window, and all that it may have made since, as
-- if made when it left; all of it, if its moments may be wrong by a step of the clock.
-- `slack` is by how much moments may be wrong.
CREATE FUNCTION share_at(s rate_shares, at timestamptz, sure_from timestamptz, window_ interval, slack interval)
RETURNS integer
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN s.left_at IS NULL OR (s.left_at < sure_from AND sure_from > at - window_ - slack) THEN s.share
        ELSE least(s.share, CASE WHEN s.left_at > at - window_ - slack THEN s.unknown ELSE 0 END
            + coalesce(s.lasting[1 + floor(
                greatest(extract(epoch FROM at - slack - s.heard_at), 0)
                / extract(epoch FROM window_) * cardinality(s.lasting))::integer], 0))
    END
$$;

-- Carries out a replica's claims, product by product in the order of ids, each under its
-- product's lock. Each statement sees what was committed before it began, so all that follows the
-- lock sees the shares of those who held it before; and clock_timestamp() is read after the lock,
-- because now() would be the moment before the wait.
--
-- p_claims: product_id, bound (the replica's share, to which it has bound itself before it asked),
--   need (the share that it needs), promise (most admits before it claims again; null for none),
--   lasting (see rate_shares).
-- p_spare: products of which the replica holds more than it needs; those come back, as not
--   granted anything, for which others are short.
-- p_seen, p_step, p_elapsed: a moment of the limiter's clock that the replica was told, the number of
--   the last step then, and the time that has passed by its own monotonic clock since it asked for it.
-- p_watched: and since it first was told that number.
-- p_slack: the longest that a replica waits for an answer.
--
-- The last row is of no product: the moment, for the next p_seen.
--
-- A replica can't tell that the clock was set before it was first told a moment. So it ends a share
-- that is not heard of only after it has watched, by its own clock, for as long as one holds.
CREATE FUNCTION claim_shares(
    p_replica_id uuid, p_claim_no bigint, p_claims jsonb, p_spare uuid[],
    p_seen timestamptz, p_step bigint, p_elapsed interval, p_watched interval,
    p_window interval, p_stale_ok interval, p_lease interval, p_slack interval
) RETURNS TABLE (
    product_id uuid, granted integer, cap integer, keep integer, reclaimable integer, wait_s double precision,
    at timestamptz, step bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    clock rate_clock;
    error interval;
    claim record;
    rate_limit integer;
    others record;
    free integer;
    short boolean;
    since timestamptz;
BEGIN
    INSERT INTO rate_replicas AS r VALUES (p_replica_id, p_claim_no, clock_timestamp())
    ON CONFLICT (replica_id) DO UPDATE SET claim_no = excluded.claim_no, heard_at = excluded.heard_at
    WHERE r.claim_no < excluded.claim_no;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    -- Before any product's lock: who has corrected the clock holds it, and may wait for a product.
    SELECT * INTO clock FROM rate_clock;
    error := clock_timestamp() - clock.ahead - (p_seen + p_elapsed);
    IF p_step = clock.step AND greatest(error, -error) > p_slack THEN
        -- Once more, under the lock: another may have noticed.
        SELECT * INTO clock FROM rate_clock FOR UPDATE;
        error := clock_timestamp() - clock.ahead - (p_seen + p_elapsed);
        IF p_step = clock.step AND greatest(error, -error) > p_slack THEN
            -- Others do not know yet; and what looks like a step may be a statement that was long on its way.
            UPDATE rate_clock c
            SET ahead = c.ahead + error, step = c.step + 1, sure_from = p_seen + p_elapsed + p_slack
            RETURNING c.step INTO p_step;
            p_watched := '0';
        END IF;
    END IF;

    FOR claim IN
        SELECT * FROM jsonb_to_recordset(p_claims) AS claim (
            product_id uuid, bound integer, need integer, promise integer,
            lasting integer[])
        ORDER BY 1
    LOOP
        PERFORM FROM rate_limiters WHERE product_id = claim.product_id FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        CONTINUE WHEN EXISTS (
            SELECT FROM rate_shares
            WHERE product_id = claim.product_id AND replica_id = p_replica_id AND left_at IS NOT NULL);
        SELECT * INTO clock FROM rate_clock;
        at := clock_timestamp() - clock.ahead;
        step := clock.step;
        -- The clock was set while this waited for the lock; or the replica no longer waits for the answer.
        error := at - (p_seen + p_elapsed);
        CONTINUE WHEN p_step = step AND greatest(error, -error) > p_slack;
        -- The limit may just have been lifted; no integer is large enough for that, but this one is.
        SELECT coalesce(rate_limit_rpm, 1000000000) INTO rate_limit FROM products WHERE product_id = claim.product_id;
        DELETE FROM rate_shares
        WHERE product_id = claim.product_id AND replica_id <> p_replica_id
            AND CASE
                WHEN left_at IS NULL THEN
                    until <= at AND p_step = step AND p_watched >= p_stale_ok + p_window + p_slack
                ELSE greatest(left_at, clock.sure_from) + p_window + p_slack <= at
            END;
        -- Tokens of the version before, which numbers its grants and reads its clock without `ahead`.
        DELETE FROM rate_grants WHERE product_id = claim.product_id AND granted_at <= clock_timestamp() - p_window;
        SELECT coalesce(sum(share_at(s, at, clock.sure_from, p_window, p_slack)), 0)
                + (SELECT count(*) FROM rate_grants WHERE product_id = claim.product_id) AS taken,
            count(*) FILTER (WHERE left_at IS NULL AND (share > 0 OR short_until > at)) AS replicas,
            coalesce(bool_or(left_at IS NULL AND short_until > at), false) AS short,
            coalesce(bool_or(left_at IS NULL AND short_until > at AND short_since < at - 2 * p_lease), false)
                AS long_short,
            coalesce(sum(greatest(share - need, 0)) FILTER (WHERE left_at IS NULL), 0) AS spare
        INTO others
        FROM rate_shares s WHERE product_id = claim.product_id AND replica_id <> p_replica_id;

        free := greatest(rate_limit - others.taken - claim.bound, 0);
        -- While some stay short, nobody gets more than an even part: whoever has the tokens would
        -- otherwise keep them for ever. Rounded down if the limit was lowered, so that all fit in.
        cap := CASE
            WHEN others.taken + claim.bound > rate_limit THEN rate_limit / (others.replicas + 1)
            WHEN others.long_short THEN ceil(rate_limit / (others.replicas + 1)::numeric)
            ELSE rate_limit
        END;
        short := claim.need > claim.bound + free OR claim.need > cap;
        -- What it may hold without need, to go on with if the registry is lost.
        keep := CASE WHEN short OR others.short OR rate_limit = 1000000000 THEN 0 ELSE rate_limit / (2 * (others.replicas + 1)) END;
        granted := least(greatest(least(greatest(claim.need, keep), cap) - claim.bound, 0), free);
        INSERT INTO rate_shares AS s (
            product_id, replica_id, share, need, unknown, lasting, heard_at, until, short_since, short_until)
        VALUES (
            claim.product_id, p_replica_id, claim.bound + granted, claim.need,
            coalesce(claim.promise, claim.bound) + granted, claim.lasting, at,
            at + p_stale_ok + p_window + p_slack, CASE WHEN short THEN at END,
            CASE WHEN short THEN at + 3 * p_lease END)
        ON CONFLICT (product_id, replica_id) DO UPDATE
        SET share = excluded.share, need = excluded.need, unknown = excluded.unknown,
            lasting = excluded.lasting, heard_at = excluded.heard_at, until = excluded.until,
            short_since = CASE WHEN s.short_until > at THEN least(s.short_since, excluded.short_since)
                ELSE excluded.short_since END,
            short_until = excluded.short_until
        RETURNING short_since INTO since;
        product_id := claim.product_id;
        -- Others are given the time to notice, but not for ever: they may be dead.
        reclaimable := CASE WHEN since > at - 3 * p_lease THEN others.spare ELSE 0 END;
        wait_s := NULL;
        IF short THEN
            -- When the next admit of anybody leaves the window.
            SELECT extract(epoch FROM min(heard_at + i * (p_window / cardinality(lasting))) - at) INTO wait_s
            FROM rate_shares s, generate_series(1, cardinality(lasting)) AS i
            WHERE product_id = claim.product_id
                AND coalesce(lasting[i + 1], 0) < lasting[i]
                AND heard_at + i * (p_window / cardinality(lasting)) > at;
        END IF;
        RETURN NEXT;
    END LOOP;

    SELECT * INTO clock FROM rate_clock;
    at := clock_timestamp() - clock.ahead;
    step := clock.step;
    RETURN QUERY
        SELECT DISTINCT s.product_id, 0, NULL::integer, NULL::integer, NULL::integer, NULL::double precision, at, step
        FROM rate_shares s
        WHERE s.product_id = ANY (p_spare) AND s.replica_id <> p_replica_id AND left_at IS NULL AND short_until > at;
    error := at - (p_seen + p_elapsed);
    -- Not if the clock was set meanwhile: what the replica was told before is needed to notice.
    IF (p_step = step AND greatest(error, -error) > p_slack) IS NOT TRUE THEN
        SELECT NULL, NULL, NULL, NULL, NULL, NULL INTO product_id, granted, cap, keep, reclaimable, wait_s;
        RETURN NEXT;
    END IF;
END
$$;

-- The version before takes its tokens one by one: within what the shares leave of the limit.
CREATE OR REPLACE FUNCTION take_token(p_product_id uuid, p_limit integer, p_window interval) RETURNS double precision
LANGUAGE plpgsql AS $$
DECLARE
    limiter rate_limiters;
    at timestamptz;
    free_at timestamptz;
BEGIN
    SELECT * INTO limiter FROM rate_limiters WHERE product_id = p_product_id FOR UPDATE;
    at := greatest(clock_timestamp(), limiter.last_at);
    SELECT p_limit - coalesce(sum(share_at(s, at - ahead, sure_from, p_window, interval '1 s')), 0) INTO p_limit
        FROM rate_shares s, rate_clock
        WHERE product_id = p_product_id
            -- Two days are longer than any share holds.
            AND (left_at IS NOT NULL OR greatest(until, sure_from + interval '2 days') > at - ahead);
    IF p_limit <= 0 THEN
        RETURN 1;
    END IF;
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
