"""A process that calls with wrong keys, as often as it is let, until its input ends.

Its arguments are HOST:PORT, how many connections, and how many calls a second on all of them. It prints, as JSON, how
many calls were answered with which status.
"""

import asyncio
import json
import secrets
import sys
from collections import Counter


async def _flood(address: str, connections: int, calls_per_s: float) -> Counter[int]:
    loop = asyncio.get_running_loop()
    statuses: Counter[int] = Counter()

    async def call_for_ever() -> None:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        due = loop.time() + connections / calls_per_s * secrets.randbelow(1000) / 1000
        while True:
            # Who was made to wait is not given time to catch up.
            due = max(due, loop.time()) + connections / calls_per_s
            await asyncio.sleep(due - loop.time())
            key = f"pk-sept-{secrets.token_urlsafe(32)}"
            writer.write(f"POST /engines/ada/admit HTTP/1.1\r\nhost: a\r\nx-platform-key: {key}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            await reader.readexactly(int(head.lower().partition("content-length: ")[2].partition("\r\n")[0]))
            statuses[int(head.split()[1])] += 1

    callers = [asyncio.create_task(call_for_ever()) for _ in range(connections)]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    # A caller ends only if it fails.
    await asyncio.wait([*callers, ended], return_when=asyncio.FIRST_COMPLETED)
    for caller in callers:
        if caller.done():
            caller.result()
        caller.cancel()
    return statuses


if __name__ == "__main__":
    address, connections, calls_per_s = sys.argv[1:]
    print(json.dumps(asyncio.run(_flood(address, int(connections), float(calls_per_s)))))
