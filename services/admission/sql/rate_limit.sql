-- name: claim_shares
SELECT product_id, granted, cap, keep, reclaimable, wait_s, at, step
FROM claim_shares(
    %(replica_id)s, %(claim_no)s, %(claims)s, %(spare)s, %(seen)s, %(step)s,
    make_interval(secs => %(elapsed_s)s), make_interval(secs => %(watched_s)s),
    make_interval(secs => %(window_s)s), make_interval(secs => %(stale_ok_s)s), make_interval(secs => %(lease_s)s),
    make_interval(secs => %(slack_s)s))

-- name: forget_replica
-- What it may have admitted that is not known: what its share allowed, since it never has more than
-- that in a window, beside what it had made known; and if it was heard of late, what it had promised.
-- All that its share allowed, if it is not known when it was heard, because the clock was set since.
-- In the order of ids, as claims are carried out, so that nobody waits for each other in a circle.
WITH shares AS (
    SELECT product_id FROM rate_shares
    WHERE replica_id = %(replica_id)s AND left_at IS NULL
    ORDER BY product_id
    FOR UPDATE
)
UPDATE rate_shares
SET left_at = moment,
    unknown = CASE WHEN heard_at BETWEEN sure_from AND moment THEN least(
        CASE WHEN heard_at > moment - make_interval(secs => %(promised_s)s) THEN unknown ELSE share END,
        share - coalesce(lasting[1 + ceil(
            (extract(epoch FROM moment - heard_at) + %(error_s)s) / %(window_s)s * cardinality(lasting))::integer], 0))
        ELSE share END
FROM shares, (SELECT clock_timestamp() - ahead AS moment, sure_from FROM rate_clock) AS clock
WHERE replica_id = %(replica_id)s AND rate_shares.product_id = shares.product_id

-- name: forget_numbers
-- Of replicas whose statements are no longer on their way.
DELETE FROM rate_replicas WHERE heard_at < clock_timestamp() - interval '1 day'

-- name: leave
-- All that it has admitted was made known.
WITH shares AS (
    SELECT product_id FROM rate_shares
    WHERE replica_id = %(replica_id)s AND left_at IS NULL
    ORDER BY product_id
    FOR UPDATE
)
UPDATE rate_shares SET left_at = clock_timestamp() - ahead, share = least(share, lasting[1]), unknown = 0
FROM shares, rate_clock
WHERE replica_id = %(replica_id)s AND rate_shares.product_id = shares.product_id
