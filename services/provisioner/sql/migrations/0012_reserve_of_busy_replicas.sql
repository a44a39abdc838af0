-- While nobody is short, half of what nobody needs of a product's limit is spread over its replicas; it
-- was half of the limit, what they need included. Else the same as before.
CREATE OR REPLACE FUNCTION claim_shares(
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
        -- Beside what it needs: or one that is busy would have next to nothing then.
        keep := CASE WHEN short OR others.short OR rate_limit = 1000000000 THEN 0
            ELSE claim.need
                + greatest(rate_limit - (others.taken - others.spare) - claim.need, 0) / (2 * (others.replicas + 1)) END;
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
