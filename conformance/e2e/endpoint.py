#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Sockets of one network namespace, driven from outside: endpoint.ts writes JSON lines to stdin, answers come on stdout.

A server sends a banner "ADDRESS PORT\n" (the source it sees), echoes what it gets, and answers the peer's FIN with "bye\n".
After a chunk "quit\n" it closes first.
Python because Node has neither packet sockets nor a choice of source port with a time limit on connect.
"""
import ctypes
import errno
import fcntl
import json
import os
import resource
import selectors
import socket
import struct
import sys
import threading
import time

import streams

SOLICIT = {socket.AF_INET: (8, 0), socket.AF_INET6: (128, 129)}
out_lock = threading.Lock()
connections = {}
servers = {}
numbers = iter(range(1, 1 << 30))


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def target(address, port, scope=None):
    if family_of(address) == socket.AF_INET:
        return (address, port)
    return (address, port, 0, socket.if_nametoindex(scope) if scope else 0)


def plain(address):
    return address[7:] if address.startswith("::ffff:") else address.split("%")[0]


class Server(threading.Thread):
    def __init__(self, address, port, mark=0, transparent=False):
        super().__init__(daemon=True)
        family = family_of(address)
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if mark:
            self.listener.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
        if transparent and family == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, 75, 1)  # IPV6_TRANSPARENT
        elif transparent:
            self.listener.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT
        if family == socket.AF_INET6:
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.listener.bind((address, port))
        self.listener.listen(4096)
        self.listener.setblocking(False)
        self.selector = selectors.EpollSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.seen = []  # [source address, source port, address asked for]
        self.pending = {}

    def run(self):
        while True:
            for key, events in self.selector.select():
                if key.fileobj is self.listener:
                    self.accept()
                else:
                    self.serve(key.fileobj, events)

    def accept(self):
        while True:
            try:
                connection, peer = self.listener.accept()
            except BlockingIOError:
                return
            source = plain(peer[0])
            self.seen.append([source, peer[1], plain(connection.getsockname()[0])])
            connection.setblocking(False)
            self.pending[connection] = bytearray(f"{source} {peer[1]}\n".encode())
            self.selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def serve(self, connection, events):
        pending = self.pending[connection]
        try:
            if events & selectors.EVENT_READ:
                chunk = connection.recv(1 << 18)
                if chunk == b"quit\n":
                    self.forget(connection)
                    return
                if chunk:
                    pending += chunk
                else:
                    connection.setblocking(True)
                    connection.sendall(bytes(pending) + b"bye\n")
                    self.forget(connection)
                    return
            if pending:
                try:
                    del pending[: connection.send(pending)]
                except BlockingIOError:
                    pass  # The rest goes when there is room: EVENT_WRITE, below.
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if pending else 0)
            self.selector.modify(connection, wanted)
        except BlockingIOError:
            pass
        except OSError:
            self.forget(connection)

    def forget(self, connection):
        self.selector.unregister(connection)
        del self.pending[connection]
        connection.close()


def read_line(connection):
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError(f"closed after {line!r}")
        line += byte
    return line.decode().strip()


def listen(address, port, mark=0, transparent=False):
    server = Server(address, port, mark, transparent)
    server.start()
    servers[server.listener.getsockname()[1], family_of(address)] = server
    return {"port": server.listener.getsockname()[1]}


def seen(port, family):
    return {"seen": servers[port, socket.AF_INET6 if family == 6 else socket.AF_INET].seen}


def connect(address, port, source=None, sourcePort=0, timeout=5000, scope=None, banner=True, mark=0):
    connection = socket.socket(family_of(address), socket.SOCK_STREAM)
    if mark:
        connection.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    connection.settimeout(timeout / 1000)
    if source is not None or sourcePort:
        wildcard = "::" if family_of(address) == socket.AF_INET6 else "0.0.0.0"
        connection.bind(target(source or wildcard, sourcePort))
    started = time.monotonic()
    try:
        connection.connect(target(address, port, scope))
        took = (time.monotonic() - started) * 1000
        greeting = read_line(connection) if banner else None
    except OSError:
        connection.close()
        raise
    number = next(numbers)
    connections[number] = connection
    local = connection.getsockname()
    answer = {"connection": number, "local": plain(local[0]), "localPort": local[1], "ms": took}
    if greeting is not None:
        answer["seen"], answer["seenPort"] = greeting.split()[0], int(greeting.split()[1])
    return answer


def pattern(size):
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


def exchange(connection, bytes, timeout=5000):
    """Sends `bytes` bytes and reads them back; both at the same time."""
    channel = connections[connection]
    channel.settimeout(timeout / 1000)
    wanted = pattern(bytes)
    failures = []

    def send():
        try:
            channel.sendall(wanted)
        except OSError as error:
            failures.append(error)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    got = bytearray()
    while len(got) < bytes:
        chunk = channel.recv(1 << 18)
        if not chunk:
            # A reset is told once, to the thread that asks first.
            sender.join()
            raise failures[0] if failures else ConnectionError(f"closed after {len(got)} of {bytes} bytes")
        got += chunk
    sender.join()
    if failures:
        raise failures[0]
    if got != wanted:
        raise ValueError("other bytes came back than were sent")
    return {"bytes": len(got)}


def send(connection, text):
    connections[connection].sendall(text.encode())
    return {}


def finish(connection, timeout=5000):
    """FIN, then what the peer still sends until its FIN."""
    channel = connections.pop(connection)
    channel.settimeout(timeout / 1000)
    channel.shutdown(socket.SHUT_WR)
    rest = b""
    while True:
        chunk = channel.recv(1 << 16)
        if not chunk:
            break
        rest += chunk
    channel.close()
    return {"rest": rest.decode()}


def request(connection, text, timeout=5000):
    """Sends text and returns all that comes until the peer closes."""
    channel = connections.pop(connection)
    channel.settimeout(timeout / 1000)
    channel.sendall(text.encode())
    rest = b""
    while True:
        chunk = channel.recv(1 << 16)
        if not chunk:
            break
        rest += chunk
    channel.close()
    return {"rest": rest.decode()}


def close(connection):
    connections.pop(connection).close()
    return {}


def abort(connection):
    channel = connections.pop(connection)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    channel.close()
    return {}


def keepalive(connection, idle=1):
    """Probes of an idle connection, every second."""
    channel = connections[connection]
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    return {}


def many(address, port, count, timeout=10000):
    """Opens `count` connections at once, keeps all until each has its banner, then closes them."""
    selector = selectors.EpollSelector()
    end = time.monotonic() + timeout / 1000
    waiting, done, failures, sources = {}, [], {}, set()

    def fail(connection, name):
        failures[name] = failures.get(name, 0) + 1
        if connection in waiting:
            selector.unregister(connection)
            del waiting[connection]
        connection.close()

    for _ in range(count):
        connection = socket.socket(family_of(address), socket.SOCK_STREAM)
        connection.setblocking(False)
        code = connection.connect_ex(target(address, port))
        if code not in (0, errno.EINPROGRESS):
            fail(connection, errno.errorcode[code])
            continue
        waiting[connection] = b""
        selector.register(connection, selectors.EVENT_READ)
    while waiting and time.monotonic() < end:
        for key, _ in selector.select(max(0, end - time.monotonic())):
            connection = key.fileobj
            try:
                chunk = connection.recv(256)
            except OSError as error:
                fail(connection, errno.errorcode[error.errno])
                continue
            if not chunk:
                fail(connection, "EOF")
                continue
            waiting[connection] += chunk
            if waiting[connection].endswith(b"\n"):
                sources.add(waiting[connection].decode().split()[0])
                selector.unregister(connection)
                del waiting[connection]
                done.append(connection)
    for connection in list(waiting):
        fail(connection, "timeout")
    for connection in done:
        connection.close()
    return {"answered": len(done), "failures": failures, "sources": sorted(sources)}


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(address, timeout=2000, size=16):
    family = family_of(address)
    six = family == socket.AF_INET6
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    kind, reply = SOLICIT[family]
    number = os.getpid() & 0xFFFF
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        body = struct.pack("!BBHHH", kind, 0, 0, number, 1) + pattern(size)
        if not six:  # the kernel fills in ICMPv6's
            body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        end = time.monotonic() + timeout / 1000
        raw.sendto(body, target(address, 0))
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no echo reply from {address}")
            raw.settimeout(left)
            packet, source = raw.recvfrom(65535)
            if not six:
                packet = packet[(packet[0] & 15) * 4 :]
            if plain(source[0]) == address and packet[0] == reply and packet[4:6] == struct.pack("!H", number):
                return {}


def frame(ifname, hex, count=1, bypass=False):
    """Ethernet frames as they are, past the IP stack; past the egress hook of tc too if so asked."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        if bypass:
            raw.setsockopt(263, 20, 1)  # SOL_PACKET, PACKET_QDISC_BYPASS
        raw.bind((ifname, 0))
        for _ in range(count):
            raw.send(bytes.fromhex(hex))
    return {}


# linux/ethtool.h: ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO
OFFLOADS = {"checksum": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}


def offload(ifname, **wanted):
    """Turns offloads of an interface on or off, as ethtool -K does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for name, on in wanted.items():
            value = ctypes.create_string_buffer(struct.pack("II", OFFLOADS[name], on))
            request = struct.pack("16sP", ifname.encode(), ctypes.addressof(value))
            fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL
    return {}


class Segments:
    """A TCP client byte by byte, past the IP stack, which must be kept from sending RST."""

    def __init__(self, ifname, mac, gateway, source, sourcePort, address, port, timeout):
        self.raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.raw.bind((ifname, 0))
        self.six = ":" in address
        self.type = b"\x86\xdd" if self.six else b"\x08\x00"
        self.ethernet = bytes.fromhex(gateway.replace(":", "") + mac.replace(":", "")) + self.type
        family = family_of(address)
        self.source, self.address = socket.inet_pton(family, source), socket.inet_pton(family, address)
        self.ports = struct.pack("!HH", sourcePort, port)
        self.seq, self.ack = 0x01020304, 0
        self.id = sourcePort  # a new one for each connection: the old ones are remembered for a while
        self.end = time.monotonic() + timeout / 1000

    def segment(self, flags, data=b""):
        tcp = self.ports + struct.pack("!IIBBHHH", self.seq, self.ack, 5 << 4, flags, 0xFFFF, 0, 0) + data
        pseudo = self.source + self.address + struct.pack("!II", len(tcp), 6)
        return tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]

    def packet(self, payload, offset=0, more=False, fragmented=False):
        if self.six:
            extension = struct.pack("!BBHI", 6, 0, offset | more, self.id) if fragmented else b""
            size = len(extension) + len(payload)
            return struct.pack("!IHBB", 6 << 28, size, 44 if fragmented else 6, 64) + self.source + self.address + extension + payload
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), self.id, offset // 8 | (0x2000 if more else 0), 64, 6, 0)
        header += self.source + self.address
        return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload

    def send(self, *packets):
        for packet in packets:
            self.raw.send(self.ethernet + packet)

    def fragments(self, segment, sizes):
        """Packets with `sizes` bytes of the segment each, and one with the rest. They get an id of their own."""
        self.id += 1
        packets, at = [], 0
        for size in (*sizes, None):
            part = segment[at:] if size is None else segment[at : at + size]
            packets.append(self.packet(part, at, size is not None, True))
            at += len(part)
        return packets

    def receive(self):
        """Flags, sequence number and data of the next segment of this connection."""
        wanted = self.ports[2:] + self.ports[:2]
        while True:
            left = self.end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.raw.settimeout(left)
            frame, peer = self.raw.recvfrom(65535)
            if frame[12:14] != self.type or peer[2] == 4:  # PACKET_OUTGOING
                continue
            ip = frame[14:]
            if self.six:
                tcp = ip[40 : 40 + struct.unpack("!H", ip[4:6])[0]] if ip[6] == 6 else b""
            else:
                tcp = ip[(ip[0] & 15) * 4 : struct.unpack("!H", ip[2:4])[0]] if ip[9] == 6 else b""
            if tcp[:4] != wanted:
                continue
            return tcp[13], struct.unpack("!I", tcp[4:8])[0], tcp[(tcp[12] >> 4) * 4 :]

    def connect(self):
        self.send(self.packet(self.segment(0x02)))
        flags, seq, _ = self.receive()
        if flags & 0x12 != 0x12:
            raise ConnectionError(f"flags {flags:#x} instead of SYN ACK")
        self.seq += 1
        self.ack = seq + 1
        self.send(self.packet(self.segment(0x10)))

    def read(self, size):
        got = b""
        while len(got) < size:
            flags, seq, data = self.receive()
            if flags & 0x04:
                raise ConnectionResetError(errno.ECONNRESET, "reset")
            if seq == self.ack:
                got += data
                self.ack = (self.ack + len(data)) & 0xFFFFFFFF
            if data:
                self.send(self.packet(self.segment(0x10)))
        return got


def segments(orders, sizes=(32, 24), data=64, timeout=5000, **where):
    """Connects and sends `data` bytes once for each order of its fragments; returns what came back after the greeting."""
    client = Segments(timeout=timeout, **where)
    client.connect()
    greeting = b""
    while not greeting.endswith(b"\n"):
        greeting += client.read(1)
    segment = client.segment(0x18, pattern(data))
    for order in orders:
        packets = client.fragments(segment, sizes)
        client.send(*[packets[i] for i in order])
    client.seq += data
    echo = client.read(data)
    client.send(client.packet(client.segment(0x14)))
    return {"greeting": greeting.decode().strip(), "echo": echo.decode()}


def lone_fragment(flags=0x02, size=8, **where):
    """Sends a first fragment with `size` bytes of a segment."""
    client = Segments(timeout=1000, **where)
    client.send(client.fragments(client.segment(flags, pattern(64)), (size,))[0])
    return {}


def udp_serve(address, port, mark=0):
    server = socket.socket(family_of(address), socket.SOCK_DGRAM)
    if mark:
        server.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
    if family_of(address) == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((address, port))

    def echo():
        while True:
            text, peer = server.recvfrom(2048)
            server.sendto(plain(peer[0]).encode() + b" " + text, peer)

    threading.Thread(target=echo, daemon=True).start()
    return {}


def udp(address, port, text, timeout=2000):
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as client:
        client.settimeout(timeout / 1000)
        client.connect(target(address, port))
        client.send(text.encode())
        return {"answer": client.recv(2048).decode()}


def question(name, id):
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!HHHHHH", id, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", 16, 1)


def txt(message):
    """The data of the one TXT record in an answer."""
    at = 12
    while message[at]:
        at += message[at] + 1
    at += 5 + 10  # the question's type and class; the answer's pointer, type, class, TTL
    size = struct.unpack("!H", message[at : at + 2])[0]
    data, text = message[at + 2 : at + 2 + size], b""
    if len(data) != size:
        raise ValueError(f"{len(data)} of {size} bytes")
    while data:
        text += data[1 : 1 + data[0]]
        data = data[1 + data[0] :]
    return text.decode()


def dns(questions, source=None, sourcePort=0, transport="udp", timeout=2000, checksum=True):
    """Asks [[resolver, name, id], ...] from one socket; returns [[resolver that answered, id, text], ...]."""
    family = family_of(questions[0][0])
    wildcard = "::" if family == socket.AF_INET6 else "0.0.0.0"
    answers = []
    if transport == "tcp":
        for resolver, name, id in questions:
            with socket.socket(family, socket.SOCK_STREAM) as client:
                client.settimeout(timeout / 1000)
                client.bind(target(source or wildcard, sourcePort))
                client.connect(target(resolver, 53))
                message = question(name, id)
                client.sendall(struct.pack("!H", len(message)) + message)
                size = struct.unpack("!H", client.recv(2, socket.MSG_WAITALL))[0]
                message = client.recv(size, socket.MSG_WAITALL)
                answers.append([plain(client.getpeername()[0]), struct.unpack("!H", message[:2])[0], txt(message)])
        return {"answers": answers}
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        if not checksum:
            client.setsockopt(socket.SOL_SOCKET, 11, 1)  # SO_NO_CHECK, IPv4 only
        client.bind(target(source or wildcard, sourcePort))
        client.settimeout(timeout / 1000)
        for resolver, name, id in questions:
            client.sendto(question(name, id), target(resolver, 53))
        for _ in questions:
            message, peer = client.recvfrom(65535)
            if peer[1] != 53:
                raise ValueError(f"answer from port {peer[1]}")
            answers.append([plain(peer[0]), struct.unpack("!H", message[:2])[0], txt(message)])
    return {"answers": answers}


OPERATIONS = {
    f.__name__: f
    for f in (listen, seen, connect, exchange, send, finish, request, close, abort, many, ping, frame, offload, udp_serve, udp, dns, segments, lone_fragment, keepalive, *streams.OPERATIONS)
}


def answer(line):
    call = json.loads(line)
    try:
        result = OPERATIONS[call["operation"]](**call["arguments"])
        document = {"id": call["id"], "result": result}
    except TimeoutError:
        document = {"id": call["id"], "error": "ETIMEDOUT"}
    except OSError as error:
        document = {"id": call["id"], "error": errno.errorcode.get(error.errno, str(error))}
    except Exception as error:  # a mistake in a test: tell it, do not hang it
        document = {"id": call["id"], "error": f"{type(error).__name__}: {error}"}
    with out_lock:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()


hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for request_line in sys.stdin:
    threading.Thread(target=answer, args=(request_line,), daemon=True).start()
