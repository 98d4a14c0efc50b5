# SPDX-License-Identifier: Apache-2.0
"""Requests at a fixed rate: steady.py ADDRESS PORT PER_SECOND.

Each is a connection of its own: connect, read the server's banner, send a line, read it back, close. Prints a line with
the outcome of each ("ok", "ECONNRESET"). Runs until stdin ends and what is under way has ended.
"""

import errno
import select
import socket
import sys
import threading
import time

address, port, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
lock = threading.Lock()


def request():
    try:
        with socket.create_connection((address, port), timeout=10) as connection:
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
    thread = threading.Thread(target=request)
    thread.start()
    threads.append(thread)
    due = max(due + 1 / rate, time.monotonic() - 1)
for thread in threads:
    thread.join()
