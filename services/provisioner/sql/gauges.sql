-- name: gauges
-- What each gauge shows: its name, the value of its label if it has one, and its number. All of it by
-- partial indexes, or from tables that stay small.
SELECT 'open' AS gauge, queue AS label, count(*)::double precision AS n
FROM operations WHERE finished_at IS NULL AND quarantined_at IS NULL GROUP BY queue
UNION ALL
SELECT 'oldest', NULL, coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)
-- A backup takes as long as its volume is large; one that dies is ended by its lease.
FROM operations WHERE finished_at IS NULL AND quarantined_at IS NULL AND kind <> 'backup'
UNION ALL
SELECT 'quarantined', NULL, count(*) FROM operations WHERE finished_at IS NULL AND quarantined_at IS NOT NULL
UNION ALL
SELECT 'engines', split_part(name, ':', 2), sum(n) FROM counts WHERE name LIKE 'engines:%%' GROUP BY name
UNION ALL
SELECT 'pool', CASE status WHEN 'running' THEN 'ready' ELSE 'booting' END, count(*)
FROM engines WHERE node = %(node)s AND product_id IS NULL AND status IN ('running', 'provisioning') GROUP BY status
UNION ALL
SELECT 'ports', 'leased', count(*) FROM port_leases
WHERE node = %(node)s AND port BETWEEN %(port_min)s AND %(port_max)s
UNION ALL
SELECT 'ports', 'set_aside', count(*) FROM ports_set_aside a
WHERE node = %(node)s AND port BETWEEN %(port_min)s AND %(port_max)s
    AND until BETWEEN clock_timestamp() AND clock_timestamp() + interval '1 minute'
    AND NOT EXISTS (SELECT FROM port_leases l WHERE l.node = a.node AND l.port = a.port)
