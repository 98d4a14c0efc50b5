// SPDX-License-Identifier: Apache-2.0
// What the plugin's ADD leaves for pods that are not enrolled, for many pods by one process: on a node, with the entry of
// the conflist and the pods as JSON on stdin.

import { readFileSync } from 'node:fs';
import { loadNative } from '../../plugin/addon.ts';
import { attachmentKey } from '../../plugin/attachments.ts';
import { attach } from '../../plugin/datapath.ts';
import { parseConfig } from '../../plugin/redirect/config.ts';

export interface Recording {
  entry: Record<string, unknown>;
  network: string;
  pods: { containerId: string; netns: string; namespace: string; name: string; uid: string }[];
}

const { entry, network, pods } = JSON.parse(readFileSync(0, 'utf8')) as Recording;
const native = loadNative();
const config = parseConfig(entry);
for (const { containerId, netns, namespace, name, uid } of pods) {
  attach(native, config, {
    key: attachmentKey(native, network, containerId, 'eth0'),
    network,
    containerId,
    ifname: 'eth0',
    netnsPath: netns,
    resultAddresses: [],
    pod: { name, namespace, uid, serviceAccount: '' },
    role: 'none',
    strict: true,
    shaped: false,
    egressLimited: false,
    bypassInbound: false,
  });
}
