#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""answer.py IFNAME HEX: sends an Ethernet frame with a TCP segment and prints the first frame that answers it, in hex.

Node has no packet sockets.
"""
import socket
import sys
import time

ETH_P_ALL = 3


def tcp_ports(frame):
    kind, header = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and header[9] == socket.IPPROTO_TCP:
        at = (header[0] & 15) * 4
    elif kind == b"\x86\xdd" and header[6] == socket.IPPROTO_TCP:
        at = 40
    else:
        return None
    return header[at : at + 2], header[at + 2 : at + 4]


ifname, question = sys.argv[1], bytes.fromhex(sys.argv[2])
source, destination = tcp_ports(question)
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as raw:
    raw.bind((ifname, ETH_P_ALL))
    raw.send(question)
    end = time.monotonic() + 5
    while True:
        left = end - time.monotonic()
        if left <= 0:
            sys.exit(f"{ifname}: no answer within 5 s")
        raw.settimeout(left)
        try:
            frame = raw.recv(2048)
        except TimeoutError:
            continue
        if tcp_ports(frame) == (destination, source):
            print(frame.hex())
            break
