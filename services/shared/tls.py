"""How parts of the platform on several machines know each other: by certificates of one CA, each with its part's name.

Whoever has none gets nothing. On one machine unix sockets do without: only those may call who may pass their directory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

UNIX = "unix:"
"""What an address begins with that is the path of a socket."""

Option = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Args:
    certificate: PEM file, with the intermediate ones behind it.
    key: PEM file of its private key.
    """

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Identity(Certificate):
    """What a part shows to the others, and by what it knows them.

    Args:
        ca: PEM file of the CA that has signed all of their certificates.
    """

    ca: Path

    def for_server(self) -> grpc.ServerCredentials:
        """For a server that nobody without a certificate can call. Renewed files count from the next connection on."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=True
        )

    def for_client(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.certificate.read_bytes())

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], self.ca.read_bytes())


def channel(address: str, part: str, identity: Identity | None, options: Sequence[Option]) -> grpc.aio.Channel:
    """A channel to another part.

    Args:
        address: `host:port`, or `unix:` and a path; several of hosts by their IPv4 addresses, separated by commas.
        part: the name that its certificate must have, whatever host it is on.
        identity: of this part; None if the other speaks no TLS, as over a unix socket.
        options: of the channel.
    """
    if "," in address:
        address = f"ipv4:{address}"
    if identity is None or address.startswith(UNIX):
        return grpc.aio.insecure_channel(address, options=options)
    named = (*options, ("grpc.ssl_target_name_override", part))
    return grpc.aio.secure_channel(address, identity.for_client(), options=named)
