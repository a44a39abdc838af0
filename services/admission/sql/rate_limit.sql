-- name: claim_shares
SELECT product_id, granted, cap, keep, reclaimable, wait_s, at, ahead
FROM claim_shares(
    %(replica_id)s, %(claim_no)s, %(claims)s, %(spare)s, %(seen)s, %(ahead)s,
    make_interval(secs => %(elapsed_s)s),
    make_interval(secs => %(window_s)s), make_interval(secs => %(stale_ok_s)s), make_interval(secs => %(lease_s)s),
    make_interval(secs => %(slack_s)s))

-- name: forget_replica
-- What it may have admitted that is not known: what its share allowed, since it never has more than
-- that in a window, beside what it had made known; and if it was heard of late, what it had promised.
UPDATE rate_shares
SET left_at = moment,
    unknown = least(
        CASE WHEN heard_at > moment - make_interval(secs => %(promised_s)s) THEN unknown ELSE share END,
        share - coalesce(lasting[1 + ceil(
            (extract(epoch FROM moment - heard_at) + %(error_s)s) / %(window_s)s * cardinality(lasting))::integer], 0))
FROM (SELECT clock_timestamp() - ahead AS moment FROM rate_clock) AS clock
WHERE replica_id = %(replica_id)s AND left_at IS NULL

-- name: leave
-- All that it has admitted was made known.
UPDATE rate_shares SET left_at = clock_timestamp() - ahead, share = least(share, lasting[1]), unknown = 0
FROM rate_clock
WHERE replica_id = %(replica_id)s AND left_at IS NULL
