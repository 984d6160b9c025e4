"""A bare TCP socket and memory behind it: what a stream of bytes takes, and nothing else.

Run with a port and a number of bytes. A client says "p" and sends so many bytes,
which are answered by one, or says "g" and gets those it has sent.
"""

from __future__ import annotations

import mmap
import socket
import sys

LOCAL_HOST = "127.0.0.1"
PUT, GET, DONE = b"p", b"g", b"d"


def receive(sock: socket.socket, memory: memoryview) -> None:
    """Fill the memory. Raises EOFError where the other side ends before."""
    received = 0
    while received < len(memory):
        taken = sock.recv_into(memory[received:])
        if not taken:
            raise EOFError("the other side has ended")
        received += taken


def converse(sock: socket.socket, memory: memoryview) -> None:
    """Until the client goes."""
    while word := sock.recv(1):
        if word == PUT:
            receive(sock, memory)
            sock.sendall(DONE)
        elif word == GET:
            sock.sendall(memory)


def main() -> None:
    port, total_bytes = map(int, sys.argv[1:])
    memory = memoryview(mmap.mmap(-1, total_bytes))
    with socket.create_server((LOCAL_HOST, port)) as listening:
        while True:
            client, _ = listening.accept()
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                converse(client, memory)


if __name__ == "__main__":
    main()
