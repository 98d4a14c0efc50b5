// SPDX-License-Identifier: Apache-2.0
// The agent keeps our entry in the conflist, as `install` was told to put it there.

import { Counter, Gauge } from 'prom-client';
import { ConflistWatch } from '../install/watch.ts';
import type { Agent } from './agent.ts';

/** To be made before the agent starts; start() looks at once. */
export function addConflistWatch({ native, settings, log, readiness, metrics }: Agent): ConflistWatch {
  const watch = new ConflistWatch(native, settings.runDir);
  const registers = [metrics.registry];
  const repairs = new Counter({
    name: 'ambient_redirect_conflist_repairs_total',
    help: 'times that the entry was put into the conflist, or put right',
    registers,
  });
  new Gauge({
    name: 'istio_cni_install_ready',
    help: '1 while the entry is in the conflist that the runtime reads, else 0',
    registers,
    collect() {
      this.set(watch.state.entry === 'there' ? 1 : 0);
    },
  });
  watch.on('repaired', ({ name, notes }) => {
    repairs.inc();
    log.info({ file: name, changes: notes }, 'the entry was put into the conflist');
  });
  watch.on('fighting', (sentence) => log.warn(sentence));
  watch.on('state', ({ entry, file, reason }) => {
    if (entry === 'there') log.info({ file }, 'the entry is in the conflist');
    else log[entry === 'failed' ? 'error' : 'info']({ entry, reason }, 'the entry is not in the conflist');
  });
  readiness.add('conflist', () => {
    const { entry, reason } = watch.state;
    // Who does not install with this executable has the entry in a way of his own.
    return entry === 'there' || (entry === 'uninstalled' && !watch.left) ? null : reason || 'not looked at yet';
  });
  return watch;
}
