// SPDX-License-Identifier: Apache-2.0
// node ztunnel-stand-in.ts SOCKET DIRECTORY PEER: in the place of a ztunnel, for the tests of the bench. Connects to the
// ZDS socket, and has the bench's native proxy listen in every network namespace that it is handed, with ztunnel's mark;
// DIRECTORY/UID has what that counts. Unlike the plugin's own stand-in it can be redirected to by netfilter rules, too.

import { spawn } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import { SeqpacketConnection } from '../../plugin/zds/connection.ts';
import { decodeRequest, encodeAck, encodeHello } from '../../plugin/zds/messages.ts';
import { IN_POD_MARK } from './proxies.ts';

const [socket = '', directory = '', peer = ''] = process.argv.slice(2);

function serve(uid: string, netns: number): void {
  const counters = join(directory, uid);
  writeFileSync(counters, '');
  const listen = ['outbound,15001', 'inbound,15006', 'hbone,15008'].flatMap((listener) => ['--listen', listener]);
  const keep = ['inbound', 'hbone'].flatMap((name) => ['--keep-source', name]);
  const argv = [peer, 'proxy', '--counters', counters, ...listen, ...keep, '--mark', `${IN_POD_MARK}`, '--reuseport'];
  const enter = [`--net=/proc/${process.pid}/fd/${netns}`, 'setpriv', '--pdeathsig', 'KILL', '--', ...argv];
  spawn('nsenter', enter, { stdio: 'inherit' }).on('exit', (status) => process.exit(status ?? 1));
}

const native = loadNative();
const connection = new SeqpacketConnection(native, native.connectSeqpacket(socket), {
  onDatagram: (datagram) => {
    const request = decodeRequest(datagram.bytes);
    const netns = datagram.takeFd();
    if (request.kind === 'add' && netns !== null) serve(request.uid, netns);
    connection.send(encodeAck(null));
  },
  onEnd: (reason) => {
    process.stderr.write(`${reason}\n`);
    process.exit(1);
  },
});
connection.send(encodeHello());
