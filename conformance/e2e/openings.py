# SPDX-License-Identifier: Apache-2.0
"""Connections that are opened as fast as one a millisecond, and what became of each.

openings.py serve PORT          greets whoever connects, and closes when the other end has
openings.py open PORT PERIOD ADDRESS...  connects, reads the greeting and closes, each PERIOD seconds, to one address
                                        after the other

open: for each line on stdin it prints {"begun", "greeted", "failed": {errno's name: n}}, all since the start; at the end of
stdin it waits for what is under way, prints that once more, and ends. Source ports are counted up from below the ephemeral
range, in which a transparent proxy chooses those that it goes on from.
"""

import errno
import json
import os
import selectors
import socket
import sys
import time

FIRST_PORT, PORTS = 10_000, 22_000
LIMIT = 20


def serve(port):
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", port))
    listener.listen(4096)
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                try:
                    accepted, _ = listener.accept()
                except OSError:
                    continue
                accepted.setblocking(False)
                try:
                    accepted.send(b"hello\n")
                except OSError:
                    pass
                selector.register(accepted, selectors.EVENT_READ)
                continue
            try:
                if key.fileobj.recv(4096):
                    continue
            except BlockingIOError:
                continue
            except OSError:
                pass
            selector.unregister(key.fileobj)
            key.fileobj.close()


class Openings:
    def __init__(self, port, period, addresses):
        self.port = port
        self.period = period
        self.addresses = addresses
        self.selector = selectors.DefaultSelector()
        self.tried = 0
        self.begun = 0
        self.greeted = 0
        self.failed = {}
        self.open = {}

    def begin(self):
        address = self.addresses[self.begun % len(self.addresses)]
        source = FIRST_PORT + self.tried % PORTS
        self.tried += 1
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        one.setblocking(False)
        if ":" in address:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            one.bind(("", source))
        except OSError:
            # All have been used within a minute: this one is in TIME_WAIT still.
            one.close()
            return
        self.begun += 1
        self.open[one] = time.monotonic()
        self.selector.register(one, selectors.EVENT_READ)
        failure = one.connect_ex((address, self.port))
        if failure not in (0, errno.EINPROGRESS):
            self.end(one, errno.errorcode[failure])

    def end(self, one, failure):
        if failure is None:
            self.greeted += 1
        else:
            self.failed[failure] = self.failed.get(failure, 0) + 1
        del self.open[one]
        self.selector.unregister(one)
        one.close()

    def read(self, one):
        try:
            self.end(one, None if one.recv(64) else "EPIPE")
        except BlockingIOError:
            pass
        except OSError as error:
            self.end(one, errno.errorcode[error.errno])

    def report(self):
        print(json.dumps({"begun": self.begun, "greeted": self.greeted, "failed": self.failed}), flush=True)

    def run(self):
        os.set_blocking(0, False)
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        ending = False
        due = time.monotonic()
        while not ending or self.open:
            now = time.monotonic()
            for one, begun in list(self.open.items())[:8]:
                if now - begun > LIMIT:
                    self.end(one, "ETIMEDOUT")
            if not ending and now >= due:
                self.begin()
                # A busy machine must not have them come all at once.
                due = max(due + self.period, now - 0.01)
            for key, _ in self.selector.select(0.1 if ending else max(0, due - now)):
                if key.fileobj is not sys.stdin:
                    self.read(key.fileobj)
                    continue
                lines = os.read(0, 4096)
                if lines:
                    self.report()
                else:
                    ending = True
                    self.selector.unregister(sys.stdin)
        self.report()


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    Openings(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]).run()
