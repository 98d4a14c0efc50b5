// SPDX-License-Identifier: Apache-2.0
// The Kubernetes part of the agent alone, as a process on a test's node. Settings come as JSON in the only argument.

import { loadNative } from '../../plugin/addon.ts';
import { Api } from '../../plugin/agent/kubernetes/api.ts';
import { Enroller } from '../../plugin/agent/kubernetes/enroller.ts';
import { ProcessSandboxes } from '../../plugin/agent/kubernetes/sandboxes.ts';
import { parseConfig } from '../../plugin/redirect/config.ts';
import { ensureState } from '../../plugin/state.ts';

const settings = JSON.parse(process.argv[2] ?? '{}');
const native = loadNative();
const config = parseConfig(settings.entry);
const enroller = new Enroller({
  native,
  config,
  network: settings.network,
  state: ensureState(native, config),
  api: new Api(settings.access),
  nodeName: settings.nodeName,
  sandboxes: [new ProcessSandboxes()],
  log: (level, text, fields) => console.error(JSON.stringify({ level, text, ...fields })),
});
enroller.start();
process.once('SIGTERM', async () => {
  await enroller.stop();
  process.exit(0);
});
