#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A DNS server as a mesh proxy's: resolver.py PORT answers on all addresses of both families, UDP and TCP, until killed.

It looks at the name only: "NUMBER.big" is answered with that many bytes of TXT data, any other name with a TXT record
"TRANSPORT CLIENT-ADDRESS". Prints "ready" when it listens.
"""
import socket
import struct
import sys
import threading

IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75


def plain(address):
    return address[7:] if address.startswith("::ffff:") else address.split("%")[0]


def answer(query, transport, client):
    end = 12
    while query[end]:
        end += query[end] + 1
    end += 5
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += query[at] + 1
    text = f"{transport} {client}".encode()
    if labels[-1] == "big":
        text = b"x" * int(labels[0])
    chunks = [text[i : i + 255] for i in range(0, len(text), 255)]
    data = b"".join(bytes([len(chunk)]) + chunk for chunk in chunks)
    header = query[:2] + struct.pack("!HHHHH", 0x8180, 1, 1, 0, 0)
    return header + query[12:end] + struct.pack("!HHHIH", 0xC00C, 16, 1, 0, len(data)) + data


def serve_udp(server):
    while True:
        query, peer = server.recvfrom(4096)
        server.sendto(answer(query, "udp", plain(peer[0])), peer)


def serve_connection(connection, peer):
    with connection:
        size = struct.unpack("!H", connection.recv(2, socket.MSG_WAITALL))[0]
        reply = answer(connection.recv(size, socket.MSG_WAITALL), "tcp", plain(peer[0]))
        connection.sendall(struct.pack("!H", len(reply)) + reply)


def serve_tcp(server):
    while True:
        threading.Thread(target=serve_connection, args=server.accept(), daemon=True).start()


def main(port):
    threads = []
    for family, wildcard in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for kind, serve in ((socket.SOCK_DGRAM, serve_udp), (socket.SOCK_STREAM, serve_tcp)):
            server = socket.socket(family, kind)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM and family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
            elif kind == socket.SOCK_STREAM:
                server.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            server.bind((wildcard, port))
            if kind == socket.SOCK_STREAM:
                server.listen(128)
            threads.append(threading.Thread(target=serve, args=(server,), daemon=True))
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(int(sys.argv[1]))
