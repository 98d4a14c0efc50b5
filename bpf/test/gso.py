#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""gso.py IFNAME HEX L4 SIZE COUNT: a TCP segment of COUNT times SIZE bytes in one frame, and the RST that answers it.

HEX is the frame as far as the end of its TCP header, which begins at L4, with the lengths of the whole. It is sent as the
kernel's own stack would: to be cut into segments of SIZE later, its checksum still to be completed, the payload in pages
and not behind the headers. Prints JSON: what the answer is still to be cut into (0: nothing), and its bytes, the checksum
completed if that was left to do.
"""
import json
import socket
import struct
import sys
import time

SOL_PACKET, PACKET_VNET_HDR, OUTGOING = 263, 15, 4
NEEDS_CSUM, TCPV4, TCPV6 = 1, 1, 4
# struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
HEADER = struct.Struct("=BBHHHH")

ifname, text, l4, size, count = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
headers = bytearray.fromhex(text)
payload = bytes(size * count)
six = headers[12:14] == b"\x86\xdd"
addresses = bytes(headers[22:54] if six else headers[26:34])


def folded(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2])) + (data[-1] << 8 if len(data) % 2 else 0)
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


length = len(headers) - l4 + len(payload)
headers[l4 + 16 : l4 + 18] = struct.pack("!H", folded(addresses + struct.pack("!II", length, 6)))
ports = bytes(headers[l4 + 2 : l4 + 4] + headers[l4 : l4 + 2])

with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
    raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    raw.bind((ifname, 3))
    raw.send(HEADER.pack(NEEDS_CSUM, TCPV6 if six else TCPV4, len(headers), size, l4, 16) + headers + payload)
    end = time.monotonic() + 10
    while True:
        raw.settimeout(max(end - time.monotonic(), 0.001))
        got, peer = raw.recvfrom(1 << 17)
        frame = bytearray(got[HEADER.size :])
        at = 54 if six else 34
        if peer[2] == OUTGOING or bytes(frame[at : at + 4]) != ports:
            continue
        flags, kind, _, _, start, offset = HEADER.unpack(got[: HEADER.size])
        if flags & NEEDS_CSUM:
            frame[start + offset : start + offset + 2] = struct.pack("!H", ~folded(frame[start:]) & 0xFFFF)
        print(json.dumps({"kind": kind, "frame": frame.hex()}))
        break
