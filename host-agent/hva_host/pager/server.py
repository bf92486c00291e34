"""The pager's end of its link: a listening unix socket and the host agents connected to it. Never blocks."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable

from hva_host.pager.messages import Message, MessageDecoder, encode
from hvaqemu.errors import ProtocolError

_RECEIVE = 1 << 18
#: A host agent that does not read what it asked for is dropped; it may connect again.
_UNSENT_MAX = 4 << 20
_CLIENTS_MAX = 8
_CREDENTIALS = struct.Struct("3i")


class Client:
    """One connected host agent."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.decoder = MessageDecoder()
        self.unsent = bytearray()


class Server:
    """Accepts host agents of the same user (or root) and passes messages.

    :param poller: its descriptors are registered here.
    :param gone: told of a host agent that hung up or was dropped.
    """

    def __init__(
        self, listener: socket.socket, poller: select.epoll, gone: Callable[[Client], None] = lambda _client: None
    ) -> None:
        self._listener = listener
        self._poller = poller
        self._gone = gone
        self._clients: dict[int, Client] = {}
        listener.setblocking(False)
        poller.register(listener, select.EPOLLIN)

    def owns(self, fd: int) -> bool:
        """Is this descriptor the server's to handle?"""
        return fd in self._clients or fd == self._listener.fileno()

    def handle(self, fd: int, events: int) -> list[tuple[Client, Message, bytes]]:
        """What arrived on a ready descriptor."""
        if fd == self._listener.fileno():
            self._accept()
            return []
        client = self._clients[fd]
        if events & select.EPOLLOUT:
            self._flush(client)
        if not events & ~select.EPOLLOUT or fd not in self._clients:
            return []
        try:
            data = client.socket.recv(_RECEIVE)
            messages = client.decoder.feed(data)
        except BlockingIOError:
            return []
        except (OSError, ProtocolError):
            data, messages = b"", []
        if not data:
            self._drop(client)
        return [(client, message, payload) for message, payload in messages]

    def reply(self, client: Client, message: Message) -> None:
        """Send to one host agent, now or when it reads."""
        if client.socket.fileno() not in self._clients:
            return
        client.unsent += encode(message)
        self._flush(client)

    def broadcast(self, message: Message) -> None:
        """Send to every host agent."""
        for client in list(self._clients.values()):
            self.reply(client, message)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid not in (0, os.geteuid()) or len(self._clients) >= _CLIENTS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        self._clients[connection.fileno()] = Client(connection)
        self._poller.register(connection, select.EPOLLIN)

    def _flush(self, client: Client) -> None:
        try:
            while client.unsent:
                del client.unsent[: client.socket.send(client.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.unsent) > _UNSENT_MAX:
            self._drop(client)
            return
        self._poller.modify(client.socket, select.EPOLLIN | (select.EPOLLOUT if client.unsent else 0))

    def _drop(self, client: Client) -> None:
        del self._clients[client.socket.fileno()]
        self._poller.unregister(client.socket)
        client.socket.close()
        self._gone(client)
