#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A proxy with the sockets that ztunnel has inside each pod, run in a pod's network namespace until killed.

15001, 15006 and 15008 are dual-stack listeners with SO_REUSEPORT, backlog 128, mark 0x539 and IP_TRANSPARENT at the
IPv4 level only; DNS listens on 127.0.0.1:15053 and [::1]:15053, UDP and TCP, not transparent. Every socket that it opens
has the mark. Towards the pod it speaks from the caller's address.

15001 takes a connection on to where it was going: plainly, or to port 15008 of the addresses given by --hbone, saying
first whom it is for ("CONNECT ADDRESS PORT SOURCE\\n", where HBONE has TLS and HTTP/2). 15006 and 15008 take it to the pod.
Prints a JSON line for each connection: {"listener", "source", "sourcePort", "destination", "destinationPort"}; before
them "ready".

--no-mark, --no-transparent, --ipv4-only, --not PORT...: what a listener must not be.
"""
import argparse
import json
import os
import socket
import struct
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import resolver  # noqa: E402

MARK = 0x539
SO_MARK, SO_REUSEPORT, IP_TRANSPARENT, IPV6_TRANSPARENT = 36, 15, 19, 75
out_lock = threading.Lock()


def say(document):
    with out_lock:
        print(json.dumps(document), file=log, flush=True)


def plain(address):
    return address[7:] if address.startswith("::ffff:") else address.split("%")[0]


def opened(family, kind=socket.SOCK_STREAM):
    one = socket.socket(family, kind)
    if not options.no_mark:
        one.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK)
    return one


def listener(port):
    family = socket.AF_INET if options.ipv4_only else socket.AF_INET6
    one = opened(family)
    one.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
    if not options.no_transparent:
        one.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    one.bind(("0.0.0.0" if options.ipv4_only else "::", port))
    one.listen(128)
    return one


def connect(address, port, source=None):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    one = opened(family)
    if source is not None:
        if family == socket.AF_INET:
            one.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        else:
            one.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        one.bind((source, 0))
    try:
        one.connect((address, port))
    except OSError:
        one.close()
        raise
    return one


def pump(source, destination):
    try:
        while chunk := source.recv(1 << 16):
            destination.sendall(chunk)
        destination.shutdown(socket.SHUT_WR)
    except OSError:
        # A reset on one side is one on the other.
        for one in (source, destination):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def read_line(connection):
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("closed in the first line")
        line += byte
    return line.decode().split()


def serve(name, down, peer):
    local = down.getsockname()
    source, source_port, destination, port = plain(peer[0]), peer[1], plain(local[0]), local[1]
    try:
        if name == "hbone":
            _, destination, port, source = read_line(down)
            port = int(port)
        say({"listener": name, "source": source, "sourcePort": source_port, "destination": destination, "destinationPort": port})
        if name != "outbound":
            up = connect(destination, port, source)
        elif destination in options.hbone:
            up = connect(destination, 15008)
            up.sendall(f"CONNECT {destination} {port} {source}\n".encode())
        else:
            up = connect(destination, port)
    except OSError:
        down.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        down.close()
        return
    other = threading.Thread(target=pump, args=(up, down), daemon=True)
    other.start()
    pump(down, up)
    other.join()
    up.close()
    down.close()


def accept(name, one):
    while True:
        down, peer = one.accept()
        threading.Thread(target=serve, args=(name, down, peer), daemon=True).start()


def serve_dns():
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        for kind, run in ((socket.SOCK_DGRAM, resolver.serve_udp), (socket.SOCK_STREAM, resolver.serve_tcp)):
            one = opened(family, kind)
            one.setsockopt(socket.SOL_SOCKET, SO_REUSEPORT, 1)
            one.bind((address, 15053))
            if kind == socket.SOCK_STREAM:
                one.listen(128)
            threading.Thread(target=run, args=(one,), daemon=True).start()


parser = argparse.ArgumentParser()
parser.add_argument("--hbone", nargs="*", default=[])
parser.add_argument("--not", nargs="*", type=int, default=[], dest="without")
for flag in ("--no-mark", "--no-transparent", "--ipv4-only"):
    parser.add_argument(flag, action="store_true")
parser.add_argument("--log", type=argparse.FileType("w"), required=True, help="a line for each connection, before it goes on")
options = parser.parse_args()
log = options.log

for name, port in (("outbound", 15001), ("inbound", 15006), ("hbone", 15008)):
    if port not in options.without:
        threading.Thread(target=accept, args=(name, listener(port)), daemon=True).start()
if 15053 not in options.without:
    serve_dns()
print("ready", flush=True)
threading.Event().wait()
