"""Just enough of a DHCP server (RFC 2131) to give the one guest on a bridge its address."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_COOKIE = bytes((99, 130, 83, 99))
_ANSWERS = {1: 2, 3: 5}  # DISCOVER: OFFER, REQUEST: ACK
_LEASE = 3600


@contextmanager
def dhcp_server(device: str, server: str, client: str) -> Iterator[list[str]]:
    """Serve on a device; yields the hardware addresses of who has asked."""
    asked: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.bind(("", 67))
        thread = threading.Thread(target=_serve, args=(sock, server, client, asked), daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            # Wakes the thread up.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"end", (server, 67))
            thread.join(10)


def _serve(sock: socket.socket, server: str, client: str, asked: list[str]) -> None:
    while (packet := sock.recv(2048)) != b"end":
        if len(packet) < 240 or packet[236:240] != _COOKIE:
            continue
        kind = _options(packet[240:]).get(53, b"\0")[0]
        if kind not in _ANSWERS:
            continue
        asked.append(packet[28:34].hex(":"))
        ours = socket.inet_aton(server)
        options = {53: bytes([_ANSWERS[kind]]), 54: ours, 51: _LEASE.to_bytes(4, "big")}
        options |= {1: socket.inet_aton("255.255.255.0"), 3: ours, 6: ours}
        body = b"".join(bytes((code, len(value))) + value for code, value in options.items()) + b"\xff"
        head = bytes((2, 1, 6, 0)) + packet[4:12] + bytes(4) + socket.inet_aton(client) + ours + bytes(4)
        sock.sendto(head + packet[28:44] + bytes(192) + _COOKIE + body, ("255.255.255.255", 68))


def _options(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 1 < len(data) and data[at] != 255:
        if data[at] == 0:
            at += 1
            continue
        found[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return found
