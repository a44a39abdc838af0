-- Tells a restored registry from what it was before: whoever has read from it must not go on from there.
ALTER TABLE installation ADD COLUMN incarnation uuid NOT NULL DEFAULT gen_random_uuid();
