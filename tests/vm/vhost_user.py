"""A vhost-user back end in a process of its own, as virtiofsd is: it maps the guest RAM that QEMU hands it.

Run as a script: ``vhost_user.py SOCKET``; prints "listening", then "mapped" once it maps guest RAM. It answers what
QEMU must have answered to plug the device in and out, and serves no request of the guest's.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys

#: QEMU, docs/interop/vhost-user.rst: request, flags (version 1, and a bit for replies), size of the payload.
_HEADER = struct.Struct("=III")
_VERSION, _REPLY = 1, 1 << 2
_GET_FEATURES, _SET_MEM_TABLE, _GET_VRING_BASE, _GET_PROTOCOL_FEATURES = 1, 5, 11, 15
_VIRTIO_F_VERSION_1, _F_PROTOCOL_FEATURES = 1 << 32, 1 << 30


def main(path: str) -> None:
    """Serve one QEMU until it hangs up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("listening", flush=True)
    link, _ = listener.accept()
    mapped = []
    while True:
        header, descriptors, _, _ = socket.recv_fds(link, _HEADER.size, 16)
        if not header:
            return
        request, _, size = _HEADER.unpack(header)
        payload = link.recv(size, socket.MSG_WAITALL) if size else b""
        if request == _GET_FEATURES:
            answer(link, request, struct.pack("=Q", _VIRTIO_F_VERSION_1 | _F_PROTOCOL_FEATURES))
        elif request == _GET_PROTOCOL_FEATURES:
            answer(link, request, struct.pack("=Q", 0))
        elif request == _GET_VRING_BASE:
            answer(link, request, payload)
        elif request == _SET_MEM_TABLE:
            mapped += [mmap.mmap(descriptor, os.fstat(descriptor).st_size) for descriptor in descriptors]
            print("mapped", flush=True)
        for descriptor in descriptors:
            os.close(descriptor)


def answer(link: socket.socket, request: int, payload: bytes) -> None:
    link.sendall(_HEADER.pack(request, _VERSION | _REPLY, len(payload)) + payload)


if __name__ == "__main__":
    main(sys.argv[1])
