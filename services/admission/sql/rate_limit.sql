-- name: claim_shares
SELECT product_id, granted, cap, keep, reclaimable, wait_s, at
FROM claim_shares(
    %(replica_id)s, %(claim_no)s, %(claims)s, %(spare)s, %(seen)s, make_interval(secs => %(elapsed_s)s),
    make_interval(secs => %(window_s)s), make_interval(secs => %(stale_ok_s)s), make_interval(secs => %(lease_s)s),
    make_interval(secs => %(slack_s)s))

-- name: forget_replica
-- One that has not been heard for long may have begun to go on by itself, without promise.
UPDATE rate_shares
SET left_at = clock_timestamp() - ahead,
    unknown = CASE WHEN heard_at > clock_timestamp() - ahead - make_interval(secs => %(promised_s)s) THEN unknown ELSE share END
FROM rate_clock
WHERE replica_id = %(replica_id)s AND left_at IS NULL

-- name: leave
-- All that it has admitted was made known.
UPDATE rate_shares SET left_at = clock_timestamp() - ahead, share = least(share, lasting[1]), unknown = 0
FROM rate_clock
WHERE replica_id = %(replica_id)s AND left_at IS NULL
