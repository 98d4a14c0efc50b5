// SPDX-License-Identifier: Apache-2.0
// What a result was measured on and with, and the processor time of the whole machine.

import { readFileSync } from 'node:fs';
import { cpus, loadavg, release, totalmem } from 'node:os';
import { must } from '../netns.ts';

export interface Machine {
  cpu: string;
  cpus: number;
  memoryGiB: number;
  kernel: string;
  virtual: string;
  /** Of the last minute, before the bench did anything. */
  load: number;
  versions: Record<string, string>;
}

/** The first line that a command prints, on stdout or stderr; "not installed" where there is none. */
function version(argv: readonly string[], pattern: RegExp): string {
  try {
    return pattern.exec(must(['sh', '-c', '"$@" 2>&1 || true', 'sh', ...argv]))?.[1] ?? 'unknown';
  } catch {
    return 'unknown';
  }
}

/** In a namespace that goes with the command. */
function hasGeneve(): boolean {
  const attempt = 'ip link add g0 type geneve id 1 remote 192.0.2.1 2>/dev/null && echo yes || true';
  return must(['unshare', '--net', 'sh', '-c', attempt]).trim() === 'yes';
}

export function machine(versions: Record<string, string>): Machine {
  const flags = /^flags.*\bhypervisor\b/m.test(readFileSync('/proc/cpuinfo', 'utf8'));
  return {
    cpu: cpus()[0]?.model ?? 'unknown',
    cpus: cpus().length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    kernel: release(),
    virtual: flags ? 'virtual machine' : 'bare metal',
    load: loadavg()[0] ?? 0,
    versions: {
      ...versions,
      gcc: version(['gcc', '--version'], /(\d+\.\d+\.\d+)\s*$/m),
      haproxy: version(['haproxy', '-v'], /version (\S+)/),
      iperf3: version(['iperf3', '--version'], /iperf (\S+)/),
      GENEVE: hasGeneve() ? 'in the kernel' : 'not in this kernel',
      iptables: version(['iptables', '-V'], /v(\S+ \S+)/),
      wrk: version(['wrk', '-v'], /wrk (\S+)/),
    },
  };
}

/** Seconds since boot, all processors together. */
export interface ProcessorTime {
  busy: number;
  /** Part of `busy`: interrupts and softirqs. */
  interrupts: number;
  /** Taken by other virtual machines; not in `busy`. */
  stolen: number;
}

/** The first line of /proc/stat: user nice system idle iowait irq softirq steal, in hundredths of a second. */
export function processorTime(stat = readFileSync('/proc/stat', 'utf8')): ProcessorTime {
  const [user = 0, nice = 0, system = 0, , , irq = 0, softirq = 0, steal = 0] = (/^cpu +(.*)$/m.exec(stat)?.[1] ?? '')
    .split(' ')
    .map(Number);
  const interrupts = irq + softirq;
  return { busy: (user + nice + system + interrupts) / 100, interrupts: interrupts / 100, stolen: steal / 100 };
}

export function elapsedTime(before: ProcessorTime, after: ProcessorTime): ProcessorTime {
  return {
    busy: after.busy - before.busy,
    interrupts: after.interrupts - before.interrupts,
    stolen: after.stolen - before.stolen,
  };
}
