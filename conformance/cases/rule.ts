// SPDX-License-Identifier: Apache-2.0

import type { Subject, Version } from './subject.ts';

/**
 * Where a rule comes from. MUST, SHOULD, MAY: the words of SPEC.md. `libcni` and `skel`: what Go's runtime library or
 * the reference plugins' frame do and others rely on. `runtimes`: what runtimes are known to send.
 */
export type Level = 'MUST' | 'SHOULD' | 'MAY' | 'libcni' | 'skel' | 'runtimes';

export interface Rule {
  /** Family and number, e.g. A4.3. Never re-used. */
  id: string;
  level: Level;
  /** Section of SPEC.md (1.1.0 unless said), or file of the reference implementation. */
  spec: string;
  title: string;
  /**
   * At which versions it runs, of those that the plugin supports. Absent: the newest alone.
   * With `since` or a list, a plugin that supports none of them is not concerned.
   */
  versions?: 'all' | { since: Version } | readonly Version[];
  /** Throws Violation or NotApplicable; anything else is a fault of the suite or the machine. */
  run(subject: Subject, version: Version): Promise<void>;
}
