import socket
import threading

from services.engine.server import Server


def test_drain_ends_idle_connections_and_counts_requests_that_outlast_the_grace() -> None:
    begun, finish = threading.Event(), threading.Event()

    def serve(connection: socket.socket, server: Server) -> None:
        while connection.recv(1):
            server.begin_request(connection)
            begun.set()
            finish.wait()
            if not server.end_request(connection):
                return

    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = Server(listener, serve)
    running = threading.Thread(target=server.run)
    running.start()
    # Accepted in this order: once the second one is served, the first one is known.
    with socket.create_connection(address) as idle, socket.create_connection(address) as busy:
        busy.sendall(b"x")
        assert begun.wait(10)
        server.stop()
        running.join(10)
        assert server.drain(grace_s=0.05) == 1
        assert idle.recv(1) == b""
        finish.set()
        assert server.drain(grace_s=10) == 0
        assert busy.recv(1) == b""
