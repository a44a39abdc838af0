"""Who this registry is, to what exists outside of it."""

from uuid import UUID

from services.shared.postgres import Database


async def installation_id(database: Database) -> UUID:
    """The id that every container and process of this registry carries; made with the schema."""
    async with database.connection() as connection:
        cursor = await connection.execute("SELECT installation_id FROM installation")
        row = await cursor.fetchone()
        assert row is not None, "the schema's first migration makes it"
        installation: UUID = row["installation_id"]
        return installation
