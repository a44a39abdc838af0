"""Connections: a thread each, bounded in number, and a shutdown that lets requests finish."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

MAX_CONNECTIONS = 64

Serve = Callable[[socket.socket, "Server"], object]


class Server:
    """Accepts connections and serves each in a thread of its own.

    At the limit the connection that has waited longest for (the rest of) a request gives way,
    so that idle and slow clients can't keep others out.

    Args:
        listener: a listening socket; the server closes it.
        serve: serves one connection until it ends; brackets every request between
            `begin_request` and `end_request`.
    """

    def __init__(self, listener: socket.socket, serve: Serve) -> None:
        self._listener = listener
        self._serve = serve
        self._stopping = False
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._waiting: dict[socket.socket, None] = {}  # longest first

    @property
    def stopping(self) -> bool:
        return self._stopping

    def run(self) -> None:
        """Accepts until `stop`.

        Raises:
            OSError: the listener broke: an engine that can't hear must end.
        """
        with self._listener:
            while not self._stopping:
                try:
                    connection, _ = self._listener.accept()
                except ConnectionAbortedError:
                    continue
                except OSError:
                    if self._stopping:
                        return
                    raise
                self._admit(connection)

    def stop(self) -> None:
        """Ends `run`. Takes no lock: it is called from a signal handler."""
        self._stopping = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def drain(self, grace_s: float) -> int:
        """Waits up to `grace_s` seconds for the requests under way; call it after `run`.

        Returns:
            How many are left.
        """
        with self._changed:
            for connection in self._waiting:
                _end_of_input(connection)
            self._changed.wait_for(lambda: not self._connections, grace_s)
            return len(self._connections)

    def begin_request(self, connection: socket.socket) -> None:
        """The request is here in full: from now on it is the engine that is slow, not the client."""
        with self._changed:
            self._waiting.pop(connection, None)

    def end_request(self, connection: socket.socket) -> bool:
        """The answer is sent. Returns whether another request may follow."""
        with self._changed:
            self._waiting[connection] = None
            return not self._stopping

    def _admit(self, connection: socket.socket) -> None:
        with self._changed:
            if len(self._connections) >= MAX_CONNECTIONS:
                longest = next(iter(self._waiting), None)
                if longest is None:
                    connection.close()
                    return
                del self._waiting[longest]
                _end_of_input(longest)
            self._connections.add(connection)
            self._waiting[connection] = None
        try:
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()
        except RuntimeError:  # no more threads: this client's loss, not the engine's end
            self._release(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        try:
            self._serve(connection, self)
        except OSError:
            pass  # the client has gone
        finally:
            self._release(connection)

    def _release(self, connection: socket.socket) -> None:
        with self._changed:
            # Closed under the lock, lest another thread ends the input of a number used anew.
            self._waiting.pop(connection, None)
            self._connections.discard(connection)
            connection.close()
            self._changed.notify_all()


def _end_of_input(connection: socket.socket) -> None:
    """Lets its thread read what has arrived, then nothing more; an answer can still be sent."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
