#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A server for one-way transfers, to measure a rate: PORT. "up N\n" and N bytes: answers "done\n" when it has them all;
"down N\n": sends N bytes. Then it closes."""
import socket
import sys
import threading


def serve(connection):
    with connection, connection.makefile("rb") as stream:
        word, count = stream.readline().split()
        if word == b"up":
            left = int(count)
            while left > 0:
                chunk = stream.read(min(left, 1 << 16))
                if not chunk:
                    return
                left -= len(chunk)
            connection.sendall(b"done\n")
        else:
            connection.sendall(b"x" * int(count))


listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
