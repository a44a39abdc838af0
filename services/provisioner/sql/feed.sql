-- name: drop_read_changes
-- A reader that has not looked for a minute starts anew.
DELETE FROM changes WHERE at < clock_timestamp() - interval '10 minutes'
