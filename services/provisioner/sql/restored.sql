-- Run with a restored registry, in the same transaction. It has rows of engines whose volumes are not in
-- the backup, since they were made while it was: they would come back without their data.
RESET search_path;  -- The dump has emptied it.
DELETE FROM operations WHERE engine_id = ANY (:'omitted'::uuid[]) AND finished_at IS NULL;
DELETE FROM port_leases WHERE engine_id = ANY (:'omitted'::uuid[]);
DELETE FROM engines WHERE engine_id = ANY (:'omitted'::uuid[]);

-- Whoever worked on these is not there, and their time begins anew.
UPDATE operations SET owner = NULL, lease_until = NULL, deadline = NULL WHERE finished_at IS NULL;

UPDATE installation SET incarnation = gen_random_uuid();
