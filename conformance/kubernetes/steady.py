# SPDX-License-Identifier: Apache-2.0
"""Requests at a fixed rate: steady.py ADDRESS PORT PER_SECOND.

Each is a connection of its own: connect, read the server's banner, send a line, read it back, close. Prints a line with
the outcome of each ("ok", "ECONNRESET"). Runs until stdin ends and what is under way has ended.

Source ports are counted up from below the ephemeral range. A transparent proxy connects on from the client's address and
a port of its own choice: in the ephemeral range a direct connection now and then has the four numbers of a proxied one
that is in TIME_WAIT, at the server too, and loses its first SYN by that.
"""

import errno
import select
import socket
import sys
import threading
import time

address, port, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
lock = threading.Lock()


def request(source):
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as connection:
            connection.settimeout(10)
            if ":" in address:
                # Another one may count up in the other family.
                connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            connection.bind(("", source))
            connection.connect((address, port))
            file = connection.makefile("rwb")
            if not file.readline():
                raise OSError(errno.EPIPE, "no banner")
            file.write(b"hello\n")
            file.flush()
            if file.readline() != b"hello\n":
                raise OSError(errno.EPIPE, "no echo")
        outcome = "ok"
    except TimeoutError:
        outcome = "ETIMEDOUT"
    except OSError as error:
        outcome = errno.errorcode.get(error.errno, str(error))
    with lock:
        print(outcome, flush=True)


threads = []
due = time.monotonic()
while True:
    ready, _, _ = select.select([sys.stdin], [], [], max(0, due - time.monotonic()))
    if ready and sys.stdin.read() == "":
        break
    thread = threading.Thread(target=request, args=(10_000 + len(threads) % 22_000,))
    thread.start()
    threads.append(thread)
    due = max(due + 1 / rate, time.monotonic() - 1)
for thread in threads:
    thread.join()
