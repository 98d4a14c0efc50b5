// SPDX-License-Identifier: Apache-2.0
// The Kubernetes part of the agent alone, as a process on a test's node. Settings come as JSON in the only argument.

import { loadNative } from '../../plugin/addon.ts';
import { Api } from '../../plugin/agent/kubernetes/api.ts';
import { Enroller } from '../../plugin/agent/kubernetes/enroller.ts';
import { ProcessSandboxes } from '../../plugin/agent/kubernetes/sandboxes.ts';
import { Truth } from '../../plugin/agent/truth.ts';
import { describePod } from '../../plugin/datapath.ts';
import { parseConfig } from '../../plugin/redirect/config.ts';
import { ensurePrograms, ensureState } from '../../plugin/state.ts';

const settings = JSON.parse(process.argv[2] ?? '{}');
const native = loadNative();
const config = parseConfig(settings.entry);
const state = ensureState(native, config);
ensurePrograms(native, state, config);
const say = (level: string, text: string, fields?: object) => console.error(JSON.stringify({ level, text, ...fields }));
const truth = new Truth({
  native,
  config,
  intervalMs: settings.reconcileMs ?? 30_000,
  onDrift: (drift) => say('error', 'drift', drift),
  onRepaired: (record) => say('info', `repaired ${describePod(record)}`),
  onUnrepaired: (record, error) => say('error', `not repaired: ${describePod(record)}: ${error.message}`),
  onTrouble: (error) => say('error', error.message),
});
await truth.compare();
truth.start();
const enroller = new Enroller({
  native,
  config,
  network: settings.network,
  state,
  api: new Api(settings.access),
  nodeName: settings.nodeName,
  sandboxes: [new ProcessSandboxes()],
  log: say,
});
enroller.start();
process.once('SIGTERM', async () => {
  await Promise.all([enroller.stop(), truth.stop()]);
  process.exit(0);
});
