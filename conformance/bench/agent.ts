// SPDX-License-Identifier: Apache-2.0
// npm run bench -- agent [--pods N]: how long a fresh ztunnel waits for its snapshot, and what the agent needs for it.
// The records are as the plugin writes them; each pod has a network namespace of its own.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { loadNative } from '../../plugin/addon.ts';
import { callAgent } from '../../plugin/agent-client.ts';
import { attachmentKey } from '../../plugin/attachments.ts';
import type { DemoNative } from '../../plugin/demo/native-topology.ts';
import type { AttachmentRecord } from '../../plugin/native.ts';
import { SeqpacketConnection } from '../../plugin/zds/connection.ts';
import { decodeRequest, encodeAck, encodeHello } from '../../plugin/zds/messages.ts';
import { executable } from '../e2e/topology.ts';
import { Testbed, until } from '../netns.ts';

const ROUNDS = 10;
const AIM_MS = 1_000;
const AIM_MIB = 120;

export async function benchAgent(pods: number): Promise<void> {
  const native = loadNative() as DemoNative;
  const bed = Testbed.open();
  try {
    const base = bed.directory('agent');
    const stateDir = join(bed.bpffs('bpf'), 'state');
    const runDir = join(base, 'run');
    const socket = join(base, 'ztunnel.sock');
    native.makeDirectory(stateDir, 0o700);
    native.createState(stateDir, {
      maxPods: Math.max(4_096, pods),
      maxFlows: 65_536,
      directFlowsPerPod: 1_024,
      marks: { bypass: 0x1041, toProxy: 0x1042, tproxy: 0x1043 },
      variant: 0,
    });
    process.stderr.write(`${pods} namespaces and records\n`);
    const namespaces = bed.directory('namespaces');
    const state = native.openState(stateDir);
    for (let i = 0; i < pods; i++) {
      const path = join(namespaces, `${i}`);
      native.createNetns(path);
      bed.defer(() => native.deleteNetns(path));
      const record = recordOf(native, path, i);
      native.putAttachment(state, attachmentKey(native, record.network, record.containerId, record.ifname), record);
    }
    native.closeState(state);

    const started = performance.now();
    const agent = bed.start([
      ...[executable, 'agent', '--state-dir', stateDir, '--run-dir', runDir, '--zds-socket', socket],
      // Nothing but what is measured.
      ...['--monitoring-port', '0', '--health-port', '0', '--log-level', 'warn', '--reconcile-seconds', '86400'],
    ]);
    await until(
      'the agent serves',
      async () => {
        if (!agent.alive) throw new Error(`it ended: ${agent.output}`);
        return callAgent(runDir, 'GET', '/v1/status', undefined, 5_000).then(
          () => true,
          () => false,
        );
      },
      120_000,
    );
    const startMs = performance.now() - started;

    const times: number[] = [];
    for (let round = 0; round < ROUNDS; round++) times.push(await snapshot(native, socket, pods));
    times.sort((a, b) => a - b);
    const [median, worst] = [times[Math.floor(times.length / 2)] ?? 0, times.at(-1) ?? 0];
    const rss = Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${agent.pid}/status`, 'utf8'))?.[1]) / 1_024;
    const peak = Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${agent.pid}/status`, 'utf8'))?.[1]) / 1_024;
    const word = (kept: boolean) => (kept ? 'kept' : 'missed');
    process.stdout.write(
      [
        `agent with ${pods} pods of the contract in-pod, ${ROUNDS} fresh ztunnel connections that acknowledge at once`,
        `start until agent.sock answers      ${startMs.toFixed(0)} ms`,
        `snapshot, median / worst            ${median.toFixed(0)} / ${worst.toFixed(0)} ms (aim: under ${AIM_MS} ms, ${word(median < AIM_MS)})`,
        `resident memory, now / peak         ${rss.toFixed(0)} / ${peak.toFixed(0)} MiB (aim: under ${AIM_MIB} MB, ${word(peak * 1.048576 < AIM_MIB)})`,
        '',
      ].join('\n'),
    );
  } finally {
    bed.close();
  }
}

/** Milliseconds from connecting until SnapshotSent. */
function snapshot(native: DemoNative, socket: string, pods: number): Promise<number> {
  return new Promise((resolve, reject) => {
    const begun = performance.now();
    let added = 0;
    const connection = new SeqpacketConnection(native, native.connectSeqpacket(socket), {
      onDatagram: ({ bytes }) => {
        const request = decodeRequest(bytes);
        if (request.kind === 'add') added++;
        connection.send(encodeAck(null));
        if (request.kind !== 'snapshotSent') return;
        connection.close();
        if (added === pods) resolve(performance.now() - begun);
        else reject(new Error(`the snapshot had ${added} pods, not ${pods}`));
      },
      onEnd: (reason) => reject(new Error(reason)),
    });
    connection.send(encodeHello());
  });
}

function recordOf(native: DemoNative, netnsPath: string, index: number): AttachmentRecord {
  const netns = native.openNetns(netnsPath);
  const identity = native.netnsIdentity(netns);
  native.close(netns);
  return {
    layout: native.layoutVersion,
    state: 'attached',
    role: 'pod',
    contract: 'in-pod',
    flags: 0,
    hostIfindex: 0,
    podIfindex: 2,
    interfaceId: 0x80000000 + index,
    nsid: -1,
    netns: identity,
    enrolledAt: Math.floor(Date.now() / 1_000),
    podMac: '02:00:5e:10:00:01',
    hostMac: '00:00:00:00:00:00',
    bootId: readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim(),
    addresses: [],
    hooks: [],
    programTag: '',
    hostIfname: '',
    ifname: 'eth0',
    network: 'bench',
    containerId: `bench-${index}`,
    podName: `deployment-5d8f7c9b6-${index}`,
    podNamespace: 'default',
    podUid: `2c9d8f62-0000-4000-8000-${String(index).padStart(12, '0')}`,
    serviceAccount: 'default',
    netnsPath,
  };
}
