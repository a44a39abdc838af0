-- name: hold
-- Taken when it is free, and renewed when it is ours. The clock is read after the wait for the row,
-- and of two who want a free lease the second finds it taken. No lease holds for as long as that: such
-- a one is of before the clock was set back.
INSERT INTO loop_leases (name, owner, term, lease_until)
VALUES (%(name)s, %(owner)s, 1, clock_timestamp() + make_interval(secs => %(lease_s)s))
ON CONFLICT (name) DO UPDATE
SET owner = excluded.owner,
    term = loop_leases.term + (loop_leases.owner <> excluded.owner)::integer,
    lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
WHERE loop_leases.owner = excluded.owner OR loop_leases.lease_until
    NOT BETWEEN clock_timestamp() AND clock_timestamp() + interval '10 minutes'
RETURNING term

-- name: lock_term
-- Until the transaction's end whoever wants the lease waits for the row, also once it has run out.
SELECT FROM loop_leases
WHERE name = %(name)s AND owner = %(owner)s AND term = %(term)s AND lease_until > clock_timestamp()
FOR SHARE

-- name: release
-- The row stays, and its term with it: a term that begins anew would let an old holder pass for the new one.
UPDATE loop_leases SET lease_until = '-infinity' WHERE name = %(name)s AND owner = %(owner)s
