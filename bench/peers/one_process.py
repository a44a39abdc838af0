"""The one-process design: FastAPI over asyncpg, two look-ups by index and one decryption for each admit.

`python -m bench.peers.one_process host:port postgresql://… master-key`. It does what any admit must
and no more: no rate limit, no note of use, no flags.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any

import asyncpg
import uvicorn
from fastapi import FastAPI, Header, HTTPException

from services.shared.keys import EngineKeyring

_PRODUCT = "SELECT product_id FROM platform_keys WHERE key_hash = $1"
_ENGINE = (
    "SELECT engine_id, user_id, status, url, encrypted_key, image, created_at, last_health_at"
    " FROM engines WHERE product_id = $1 AND user_id = $2"
)


def application(database_url: str, master_key: str) -> FastAPI:
    keyring = EngineKeyring([master_key])
    pool: Any = None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal pool
        async with asyncpg.create_pool(database_url, min_size=10, max_size=10) as pool:
            yield

    async def admit(user_id: str, x_platform_key: Annotated[str, Header()]) -> dict[str, Any]:
        async with pool.acquire() as connection:
            product = await connection.fetchrow(_PRODUCT, sha256(x_platform_key.encode()).digest())
            if product is None:
                raise HTTPException(401)
            engine = await connection.fetchrow(_ENGINE, product["product_id"], user_id)
        if engine is None:
            return {"admitted": False, "engine": None, "reason": "engine_not_found"}
        answer = {
            "engine_id": str(engine["engine_id"]),
            "user_id": engine["user_id"],
            "status": engine["status"],
            "url": engine["url"],
            "api_key": keyring.decrypt(engine["engine_id"], engine["encrypted_key"]),
            "engine_version": engine["image"],
            "created_at": _moment(engine["created_at"]),
            "last_health_at": _moment(engine["last_health_at"]),
        }
        return {"admitted": True, "engine": answer}

    app = FastAPI(lifespan=lifespan)
    app.add_api_route("/engines/{user_id}/admit", admit, methods=["POST"], response_model=None)
    return app


def _moment(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


if __name__ == "__main__":
    address, database_url, master_key = sys.argv[1:]
    host, port = address.split(":")
    uvicorn.run(
        application(database_url, master_key),
        host=host,
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
