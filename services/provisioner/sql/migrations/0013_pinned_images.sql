-- What an engine's image was when the engine was made: later instances are made of the same, whatever
-- its name stands for then. Null for one that has not started since, and where images have no ids.
ALTER TABLE engines ADD COLUMN image_id text;
