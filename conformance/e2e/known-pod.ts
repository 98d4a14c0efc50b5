// SPDX-License-Identifier: Apache-2.0
// node known-pod.ts ENTRY KEY: what the agent does in its time with a pod that is recorded under KEY (hex): it attaches,
// drains the pod and takes its programs away, each with the record as it was read before. ENTRY: of the conflist, JSON.

import { loadNative } from '../../plugin/addon.ts';
import { CniError } from '../../plugin/cni/errors.ts';
import { attach, targetOf } from '../../plugin/datapath.ts';
import { beginDrain, endDrain } from '../../plugin/drain.ts';
import { parseConfig } from '../../plugin/redirect/config.ts';

const [entry = '{}', hexKey = ''] = process.argv.slice(2);
const native = loadNative();
const config = parseConfig(JSON.parse(entry));
const key = Buffer.from(hexKey, 'hex');
const state = native.openState(config.stateDir);
const recorded = native.getAttachment(state, key);
try {
  if (recorded !== null) {
    const record = attach(native, config, targetOf(key, recorded, 'pod'));
    process.stdout.write('attached');
    beginDrain(native, config, state, key, record);
    endDrain(native, config, state, key, record);
    process.stdout.write(', detached');
  }
} catch (error) {
  if (!(error instanceof CniError)) throw error;
  process.stdout.write(`refused (${error.code}): ${error.message}`);
}
