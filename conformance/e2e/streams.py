# SPDX-License-Identifier: Apache-2.0
"""Byte streams in both directions at once, hashed at both ends; operations of endpoint.py.

A client begins with a header: how many bytes each side sends, a seed, and who half-closes first. What the server sends are
random_bytes(seed), what the client sends random_bytes(seed + 1), so each end knows what it should have got, and says what
it did get. A server that does not close first adds the digest of what it got, and the client closes then: HAProxy 2.6 now
and then drops what it has not sent on yet when the client's FIN comes (1 of 1,500 megabytes over loopback).
"""
import errno
import hashlib
import random
import selectors
import socket
import struct
import threading
import time

HEADER = struct.Struct("!QQB")
CLIENT_FIRST, SERVER_FIRST = 0, 1
servers = {}


def random_bytes(seed, size):
    return random.Random(seed).randbytes(size)


def digest(data):
    return hashlib.sha256(data).hexdigest()


class Incoming:
    """One connection of a StreamServer."""

    def __init__(self):
        self.header = b""
        self.seed = None
        self.size = 0
        self.hash = hashlib.sha256()
        self.received = 0
        self.outgoing = b""
        self.order = CLIENT_FIRST
        self.ended = False


class StreamServer(threading.Thread):
    def __init__(self, address, port, family):
        super().__init__(daemon=True)
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.listener.bind((address, port))
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.selector = selectors.EpollSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.results = {}  # by seed: bytes, sha256, how the client ended

    def run(self):
        while True:
            for key, events in self.selector.select():
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.serve(key.fileobj, key.data, events)

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, Incoming())

    def serve(self, connection, state, events):
        try:
            if events & selectors.EVENT_READ:
                chunk = connection.recv(1 << 18)
                if not chunk:
                    state.ended = True
                    self.keep(state, "FIN")
                self.take(state, chunk)
            if state.outgoing and events & selectors.EVENT_WRITE:
                state.outgoing = state.outgoing[connection.send(state.outgoing[: 1 << 20]) :]
                if not state.outgoing and state.order == SERVER_FIRST:
                    connection.shutdown(socket.SHUT_WR)
            if state.ended and not state.outgoing:
                self.selector.unregister(connection)
                connection.close()
                return
            wanted = (0 if state.ended else selectors.EVENT_READ) | (selectors.EVENT_WRITE if state.outgoing else 0)
            self.selector.modify(connection, wanted, state)
        except BlockingIOError:
            pass
        except OSError as error:
            self.keep(state, errno.errorcode.get(error.errno, str(error)))
            self.selector.unregister(connection)
            connection.close()

    def take(self, state, chunk):
        missing = HEADER.size - len(state.header)
        if missing > 0:
            state.header += chunk[:missing]
            chunk = chunk[missing:]
            if len(state.header) == HEADER.size:
                state.size, state.seed, state.order = HEADER.unpack(state.header)
                state.outgoing = memoryview(random_bytes(state.seed, state.size))
        state.hash.update(chunk)
        state.received += len(chunk)
        if chunk and state.received == state.size and state.order == CLIENT_FIRST:
            state.outgoing = memoryview(bytes(state.outgoing) + state.hash.digest())

    def keep(self, state, end):
        if state.seed is not None:
            self.results[state.seed] = {"bytes": state.received, "sha256": state.hash.hexdigest(), "end": end}


def stream_serve(port):
    """Listens on all addresses of both families."""
    for address, family in (("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)):
        server = StreamServer(address, port, family)
        server.start()
        servers[port, family] = server
    return {}


def stream_result(port, seed, timeout=5000):
    """What the server got on the stream with this seed, when it has ended."""
    end = time.monotonic() + timeout / 1000
    while time.monotonic() < end:
        for (at, _), server in list(servers.items()):
            if at == port and seed in server.results:
                return server.results[seed]
        time.sleep(0.01)
    raise TimeoutError(f"no stream {seed} has ended")


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def stream(address, port, bytes, seed, write=65536, first="client", sourcePort=0, timeout=20000):
    """One stream. Returns what was sent, got and expected, and whether ECN was in use."""
    wanted, payload = random_bytes(seed, bytes), random_bytes(seed + 1, bytes)
    with socket.socket(family_of(address), socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout / 1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sourcePort:
            connection.bind(("::" if ":" in address else "0.0.0.0", sourcePort))
        connection.connect((address, port))
        local = connection.getsockname()[1]
        order = SERVER_FIRST if first == "server" else CLIENT_FIRST
        connection.sendall(HEADER.pack(bytes, seed, order))
        failures = []

        def send():
            try:
                for at in range(0, bytes, write):
                    connection.sendall(payload[at : at + write])
            except OSError as error:
                failures.append(error)

        sender = threading.Thread(target=send, daemon=True)
        if order == CLIENT_FIRST:
            sender.start()
        got = bytearray()
        answer = bytes + (0 if order == SERVER_FIRST else hashlib.sha256().digest_size)
        while len(got) < answer and (chunk := connection.recv(1 << 18)):
            got += chunk
        if order == SERVER_FIRST:
            got += connection.recv(1)
            sender.start()
        sender.join()
        if failures:
            raise failures[0]
        connection.shutdown(socket.SHUT_WR)
        got += connection.recv(1)
        # tcp_info: 8 bytes, of which the sixth are tcpi_options; 8: ECN was negotiated, 16: a packet with ECT came.
        options = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5]
        return {
            "localPort": local,
            "sent": digest(payload),
            "got": digest(got),
            "expected": digest(wanted if order == SERVER_FIRST else wanted + hashlib.sha256(payload).digest()),
            "ecn": bool(options & 8),
            "ect": bool(options & 16),
        }


def streams(address, port, count, bytes, seed, timeout=60000):
    """
    `count` streams of which the seeds are seed, seed + 2, ...: none goes on before the first byte of every one has come.
    Returns how many were open together, how many got what they should, and the digest of all that was sent.
    """
    end = time.monotonic() + timeout / 1000
    selector = selectors.EpollSelector()
    failures, opening, open_, done, sent = {}, 0, 0, 0, hashlib.sha256()
    got, connections = {}, {}
    pending = list(range(count))[::-1]

    def fail(connection, name):
        failures[name] = failures.get(name, 0) + 1
        selector.unregister(connection)
        connection.close()

    def begin():
        nonlocal opening
        number = pending.pop()
        connection = socket.socket(family_of(address), socket.SOCK_STREAM)
        connection.setblocking(False)
        connection.connect_ex((address, port))
        connections[connection] = number
        got[number] = bytearray()
        selector.register(connection, selectors.EVENT_WRITE)
        opening += 1

    # All open, each with a byte of the server's.
    while (pending or opening) and time.monotonic() < end:
        while pending and opening < 500:
            begin()
        for key, events in selector.select(max(0, end - time.monotonic())):
            connection, number = key.fileobj, connections[key.fileobj]
            try:
                if events & selectors.EVENT_WRITE:
                    connection.send(HEADER.pack(bytes, seed + 2 * number, CLIENT_FIRST))
                    selector.modify(connection, selectors.EVENT_READ)
                    continue
                chunk = connection.recv(1 << 16)
                if not chunk:
                    raise ConnectionError(errno.ECONNABORTED, "closed")
                got[number] += chunk
                opening -= 1
                open_ += 1
                selector.unregister(connection)
            except OSError as error:
                opening -= 1
                fail(connection, errno.errorcode.get(error.errno, str(error)))
                del connections[connection]
    if failures or opening or pending:
        failures["not open"] = opening + len(pending)
        return {"open": open_, "right": 0, "failures": failures, "sent": ""}
    for connection, number in connections.items():
        connection.settimeout(max(0.1, end - time.monotonic()))
        payload = random_bytes(seed + 2 * number + 1, bytes)
        sent.update(hashlib.sha256(payload).digest())
        try:
            connection.sendall(payload)
        except OSError as error:
            failures[errno.errorcode.get(error.errno, str(error))] = 1
    for connection, number in connections.items():
        try:
            wanted = random_bytes(seed + 2 * number, bytes)
            wanted += hashlib.sha256(random_bytes(seed + 2 * number + 1, bytes)).digest()
            while len(got[number]) < len(wanted) and (chunk := connection.recv(1 << 16)):
                got[number] += chunk
            done += got[number] == wanted
        except OSError as error:
            name = errno.errorcode.get(error.errno, str(error))
            failures[name] = failures.get(name, 0) + 1
        connection.close()
    return {"open": open_, "right": done, "failures": failures, "sent": sent.hexdigest()}


def stream_results(port, seed, count):
    """The digest of what the server got on all these streams, in the same order."""
    whole = hashlib.sha256()
    for number in range(count):
        whole.update(bytes.fromhex(stream_result(port, seed + 2 * number)["sha256"]))
    return {"got": whole.hexdigest()}


OPERATIONS = (stream_serve, stream_result, stream, streams, stream_results)
