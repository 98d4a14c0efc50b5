# SPDX-License-Identifier: Apache-2.0
# Runs commands and says how long each took and how much memory it had at most. One JSON request a line on stdin:
# {"argv": [...], "env": {...}, "stdin": "..."}; one JSON answer a line on stdout: {"ms": ..., "rss": KiB, "status": ...,
# "stdout": "..."}. Small and started once, so that fork and exec cost the same for every command; the time is from
# before the fork until wait4(2) has returned, the memory what the kernel accounts to that process (ru_maxrss).
import json
import os
import sys
import tempfile
import time

for line in sys.stdin:
    request = json.loads(line)
    stdin = tempfile.TemporaryFile()
    stdin.write(request.get("stdin", "").encode())
    stdin.seek(0)
    out = tempfile.TemporaryFile()
    actions = [
        (os.POSIX_SPAWN_DUP2, stdin.fileno(), 0),
        (os.POSIX_SPAWN_DUP2, out.fileno(), 1),
        (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
    ]
    begin = time.monotonic()
    pid = os.posix_spawn(request["argv"][0], request["argv"], request["env"], file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    elapsed = time.monotonic() - begin
    out.seek(0)
    answer = {
        "ms": elapsed * 1000,
        "rss": usage.ru_maxrss,
        "status": os.waitstatus_to_exitcode(status),
        "stdout": out.read().decode(errors="replace"),
    }
    print(json.dumps(answer), flush=True)
